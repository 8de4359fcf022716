"""Distil: make a smaller student and teach it the teacher's next-token distribution.

Steps:
  1. drop the blocks of least ablation harm, behind the prefix that stays shared, and measure the
     harm of the others again after each (search.py)
  2. close the gaps in closed form on calibration rows (student.py)
  3. train what lies behind the prefix on the stored targets (objective.py); of several teachers
     in sequence, protected or not, or mixed, with the retention matrix (several.py)
  4. controls, at the same budget: the student before step 3, and one trained on the text alone

reads    prepare   calibration rows
         profile   ablation harm, subspaces
         extract   teacher targets
writes   student/, before_training/, text_only/: stock transformers folders; student.json
         retention.png, retention.txt: with several teachers
"""

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from registry.catalog import lookup
from stages.contract import Job, Metrics, Stage
from stages.params import require_at_least, require_one_of, require_within

SCHEDULES = ("mixed", "sequence")


@dataclass(frozen=True)
class Params:
    """The section `distill` of params.yaml; comments and units stand there."""

    student: str
    search_rows: int
    search_width: int
    patch_rows: int
    patch_ridge: float
    steps: int
    batch_rows: int
    learning_rate: float
    warmup: float
    clip: float
    temperature: float
    kd_weight: float
    ce_weight: float
    anchor_weight: float
    validation_rows: int
    validate_every: int
    spike: float
    regression: float
    text_only_control: bool
    fast_path: bool
    schedule: str
    teacher_order: tuple[str, ...]
    teacher_weights: tuple[float, ...]
    protect: bool
    protect_share: float
    protect_rows: int
    retention_rows: int
    seed: int

    def __post_init__(self) -> None:
        require_at_least(
            1, steps=self.steps, batch_rows=self.batch_rows, patch_rows=self.patch_rows,
            search_rows=self.search_rows,
        )  # fmt: skip
        require_at_least(0, search_width=self.search_width)
        require_at_least(1, validation_rows=self.validation_rows)
        require_at_least(1, validate_every=self.validate_every)
        require_within(0.1, 1e6, spike=self.spike)
        require_within(0.0, 1e6, regression=self.regression)
        require_at_least(0, ce_weight=self.ce_weight, anchor_weight=self.anchor_weight)
        require_at_least(0, kd_weight=self.kd_weight, seed=self.seed)
        require_within(1e-8, 1.0, learning_rate=self.learning_rate, patch_ridge=self.patch_ridge)
        require_within(0.0, 0.5, warmup=self.warmup)
        require_within(0.1, 20.0, temperature=self.temperature)
        require_within(1e-3, 1e3, clip=self.clip)
        require_one_of(SCHEDULES, schedule=self.schedule)
        require_within(0.5, 1.0, protect_share=self.protect_share)
        require_at_least(1, protect_rows=self.protect_rows, retention_rows=self.retention_rows)
        for weight in self.teacher_weights:
            require_within(1e-6, 1e6, teacher_weights=weight)
        if self.kd_weight == self.ce_weight == 0:
            raise ValueError("'kd_weight' and 'ce_weight' are both 0; one of them must teach")
        if lookup("students", self.student).construction != "pruned":
            raise ValueError(f"student '{self.student}' is a new network; only pruned ones so far")


def run(params: Params, job: Job) -> Metrics:
    """Build, patch, train, and train the control; see the module's steps."""
    import torch

    from modeling.blocks import dissect
    from modeling.loading import locate, open_model, open_tokenizer
    from stages.distill.objective import Weights
    from stages.distill.several import Course, teach
    from stages.distill.training import Lesson, train
    from stages.formats.importance import read_importance, read_subspaces
    from stages.formats.tokens import read_all_rows

    opened = open_targets(params, job)
    teacher_name, targets = next(iter(opened.items()))
    profile = job.inputs("profile")[teacher_name]
    importance = read_importance(profile)
    prefix = targets.header.prefix_blocks
    harms = [block.harm for block in importance]
    location = locate(teacher_name)
    teacher, tokenizer = open_model(location), open_tokenizer(location)
    rows = torch.from_numpy(read_all_rows(job.input("prepare"), "calibration", params.seed))
    dropped, order = choose_blocks(teacher, harms, prefix, rows, params, job)
    student, explained = build(teacher, dropped, rows[: params.patch_rows], params, job)
    save_student(student, tokenizer, job.output / "before_training")

    held_back = params.retention_rows if len(opened) > 1 else 0
    subspaces = read_subspaces(profile)
    lesson = Lesson(targets, subspaces, prefix, dropped, harms, params, held_back)
    course = Course.of(lesson, opened)
    full = Weights(params.kd_weight, params.ce_weight, params.anchor_weight, params.temperature)
    untrained = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    retention, rollbacks = teach(student, course, full, job)
    save_student(student, tokenizer, job.output / "student")
    if params.text_only_control:
        student.load_state_dict(untrained)
        alone = Weights(0.0, 1.0, 0.0, 1.0)
        rollbacks["text_only"] = train(student, course.text, alone, job, "text_only")
        save_student(student, tokenizer, job.output / "text_only")

    facts = {"teacher": teacher_name, "dropped": dropped, **order, "gap_explained": explained}
    facts["rollbacks"] = {phase: [asdict(back) for back in of] for phase, of in rollbacks.items()}
    if retention:
        facts["teachers"] = list(opened)
        show_retention(retention, job)
    (job.output / "student.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    return {
        "blocks": len(dissect(student).blocks),
        "blocks_dropped": len(dropped),
        "rollbacks": sum(map(len, rollbacks.values())),
        "parameters": sum(p.numel() for p in student.parameters()),
        "parameters_of_teacher": sum(p.numel() for p in teacher.parameters()),
        "gap_explained": sum(explained) / len(explained),
        "tokens_trained": course.text.params.steps * params.batch_rows * targets.header.row_tokens,
        **(retention.metrics() if retention else {}),
    }


def check_temperature(params: Params, samples: int) -> None:
    """Refuse a temperature of which targets of so many draws a position tell nothing."""
    if samples and params.temperature != 1:
        raise ValueError(
            f"'temperature' is {params.temperature:g}, but sampled targets tell the teacher's "
            "distribution at temperature 1 only; set distill.temperature to 1, or "
            "extract.answers to top_k"
        )


def check_among(sections: Mapping[str, Any]) -> None:
    """The same before anything runs, from all stages' parameters."""
    if extract := sections.get("extract"):
        samples = extract.samples if extract.answers == "sampled" else 0
        check_temperature(sections["distill"], samples)


def choose_blocks(
    teacher, harms: list[float], prefix: int, rows, params: Params, job: Job
) -> tuple[list[int], dict[str, list]]:
    """Step 1: the blocks to drop, by place; and in what order they went, with which harms."""
    from stages.distill.search import Search, search_blocks

    count = lookup("students", params.student).drop_blocks
    search = job.resume(Search(harms, count, prefix), "search")
    batches = rows[: params.search_rows].split(params.batch_rows)
    for _ in search_blocks(teacher, batches, search, params.search_width):
        job.step_done(search, len(search.dropped), count, "search", harm=search.harms[-1])
    return sorted(search.dropped), {"order": search.dropped, "order_harms": search.harms}


def build(teacher, dropped: list[int], rows, params: Params, job: Job) -> tuple:
    """Step 2: the student before training, and each gap's explained residual.

    Its weights are rounded to what is stored of them, so that the control is where training starts.
    """
    import torch

    from stages.distill.student import build_student, close_gaps, find_gaps

    student, gaps, explained = build_student(teacher, dropped), find_gaps(dropped), []
    for share in close_gaps(teacher, student, gaps, rows, params.patch_ridge, batch_rows=8):
        explained.append(share)
        job.note("gaps", len(explained), len(gaps), explained=share)
    for parameter in student.parameters():
        parameter.data.copy_(parameter.data.to(torch.bfloat16))
    return student, explained


def open_targets(params: Params, job: Job) -> dict:
    """The targets of each teacher, in the order in which they teach; refuses those that cannot."""
    from stages.formats.targets import TeacherTargets

    folders = job.inputs("extract")
    order = order_teachers(params, list(folders))
    opened = {name: TeacherTargets(folders[name]) for name in order}
    for targets in opened.values():
        check_temperature(params, targets.header.samples)
    return opened


def order_teachers(params: Params, names: list[str]) -> list[str]:
    """The teachers in the order in which they teach, the one that the student is cut from first.

    Raises ValueError, naming what is there, for an order or weights that are not one a teacher.
    """
    order = list(params.teacher_order) or names
    if sorted(order) != sorted(names):
        raise ValueError(
            f"'teacher_order' is {', '.join(order)}, but there are targets of {', '.join(names)}; "
            "set distill.teacher_order to these, in the order you want, or to []"
        )
    if len(params.teacher_weights) not in (0, len(names)):
        raise ValueError(
            f"'teacher_weights' has {len(params.teacher_weights)} weights for {len(names)} "
            f"teachers ({', '.join(order)}); give one each, in this order, or []"
        )
    return order


def show_retention(retention, job: Job) -> None:
    """Write the retention matrix as a picture and as text, and print it."""
    from stages.distill.retention import draw_retention

    draw_retention(retention, "what is left of each skill", job.output / "retention.png")
    (job.output / "retention.txt").write_text(retention.table() + "\n", encoding="utf-8")
    job.show("retention.png")
    for line in retention.table().splitlines():
        job.say(line)


def save_student(student, tokenizer, folder) -> None:
    """Write a folder that stock transformers opens: safetensors in bfloat16, config, tokenizer."""
    import torch

    copy.deepcopy(student).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


STAGE = Stage("distill", Params, run, check_among)
