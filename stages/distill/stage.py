"""Distil: make a smaller student and teach it the teacher's next-token distribution.

Steps:
  1. build the student (construction.py): the teacher less the blocks of least ablation harm, its
     blocks narrower or not, refitted in closed form on calibration rows; or a new network
  2. train what is not shared with the teacher on the stored targets (objective.py); of several
     teachers in sequence, protected or not, or mixed, with the retention matrix (several.py)
  3. controls: the student before step 2, and some trained at the same budget without a part of
     the loss (CONTROLS)

reads    prepare   calibration rows
         profile   ablation harm, subspaces
         extract   teacher targets
writes   student/, before_training/ and one of each control: stock transformers folders
         student.json
         retention.png, retention.txt: with several teachers
"""

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from registry.catalog import lookup
from stages.contract import Job, Metrics, Stage
from stages.params import require_at_least, require_one_of, require_within

SCHEDULES = ("mixed", "sequence")
CONTROLS = {  # what differs in a control's loss
    "text_only": {"kd": 0.0, "ce": 1.0, "anchor": 0.0, "temperature": 1.0},
    "without_anchors": {"anchor": 0.0},
    "without_text": {"ce": 0.0},
    "without_answers": {"kd": 0.0},
}


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
    controls: tuple[str, ...]
    schedule: str
    teacher_order: tuple[str, ...]
    teacher_weights: tuple[float, ...]
    protect: bool
    replay_share: float
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
        require_within(0.0, 4.0, replay_share=self.replay_share)
        require_within(0.0, 1.0, protect_share=self.protect_share)
        require_at_least(1, protect_rows=self.protect_rows, retention_rows=self.retention_rows)
        for weight in self.teacher_weights:
            require_within(1e-6, 1e6, teacher_weights=weight)
        if self.kd_weight == self.ce_weight == 0:
            raise ValueError("'kd_weight' and 'ce_weight' are both 0; one of them must teach")
        check_controls(self.controls, self.losses)
        is_mamba = lookup("students", self.student).construction == "mamba"
        if is_mamba and self.protect and self.protect_share and self.schedule == "sequence":
            raise ValueError(
                f"'protect_share' is {self.protect_share:g}, but '{self.student}' is a state-space "
                "model, which does more with its weights than multiply inputs, so that they cannot "
                "be protected; set distill.protect_share to 0, which leaves replay"
            )

    @property
    def losses(self) -> dict[str, float]:
        """How much each term of the loss counts, and its temperature."""
        weights = {"kd": self.kd_weight, "ce": self.ce_weight, "anchor": self.anchor_weight}
        return {**weights, "temperature": self.temperature}


def run(params: Params, job: Job) -> Metrics:
    """Build, train, and train the controls; see the module's steps."""
    import torch

    from modeling.blocks import dissect
    from modeling.loading import locate, open_model, open_tokenizer
    from stages.distill.construction import Source, construct
    from stages.distill.objective import Weights
    from stages.distill.several import Course, check_vocabulary, teach
    from stages.distill.training import Lesson, train
    from stages.formats.importance import read_importance, read_subspaces
    from stages.formats.tokens import read_all_rows

    opened = open_targets(params, job)
    teacher_name, targets = next(iter(opened.items()))
    profile = job.inputs("profile")[teacher_name]
    harms = [block.harm for block in read_importance(profile)]
    location = locate(teacher_name)
    teacher, tokenizer = open_model(location), open_tokenizer(location)
    check_vocabulary(len(dissect(teacher).head.weight), opened)
    rows = torch.from_numpy(read_all_rows(job.input("prepare"), "calibration", params.seed))
    built = construct(Source(teacher, harms, targets.header.prefix_blocks, rows, params, job))
    student = built.student
    save_student(student, tokenizer, job.output / "before_training")

    kept_out = params.retention_rows if len(opened) > 1 else 0
    subspaces = read_subspaces(profile)
    lesson = Lesson(
        targets, subspaces, built.prefix, built.dropped, harms, params, kept_out, built.lift
    )
    course = Course.of(lesson, opened)
    full = Weights(**params.losses)
    untrained = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    retention, rollbacks = teach(student, course, full, job)
    save_student(student, tokenizer, job.output / "student")
    for name in params.controls:
        student.load_state_dict(untrained)
        weights = replace(full, **CONTROLS[name])
        rollbacks[name] = train(student, course.control, weights, job, name)
        save_student(student, tokenizer, job.output / name)

    facts = {"teacher": teacher_name, **built.facts}
    facts["rollbacks"] = {phase: [asdict(back) for back in of] for phase, of in rollbacks.items()}
    if retention:
        facts["teachers"] = list(opened)
        show_retention(retention, job)
    (job.output / "student.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    return {
        "blocks": len(dissect(student).blocks),
        "rollbacks": sum(map(len, rollbacks.values())),
        "parameters": sum(p.numel() for p in student.parameters()),
        "parameters_of_teacher": sum(p.numel() for p in teacher.parameters()),
        "tokens_trained": course.control.params.steps
        * params.batch_rows
        * targets.header.row_tokens,
        **built.metrics,
        **(retention.metrics() if retention else {}),
    }


def check_controls(names: tuple[str, ...], losses: dict[str, float]) -> None:
    """Refuse a control that is unknown, or no control: one that is trained on nothing, or as the
    student is."""
    for name in names:
        require_one_of(tuple(CONTROLS), controls=name)
        own = {**losses, **CONTROLS[name]}
        if own == losses or own["kd"] == own["ce"] == 0:
            what = "as the student is" if own == losses else "neither on answers nor on the text"
            raise ValueError(
                f"'controls' has {name}, which with these weights would be trained {what}; leave "
                "it out of distill.controls"
            )


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
