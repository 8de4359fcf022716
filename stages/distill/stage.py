"""Distil: make a smaller student and teach it the teacher's next-token distribution.

Steps:
  1. drop the blocks of least ablation harm, behind the prefix that stays shared
  2. close the gaps in closed form on calibration rows (student.py)
  3. train what lies behind the prefix on the stored targets (objective.py)
  4. controls, at the same budget: the student before step 3, and one trained on the text alone

reads    prepare   calibration rows
         profile   ablation harm, subspaces
         extract   teacher targets
writes   student/, before_training/, text_only/: stock transformers folders; student.json
"""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from registry.catalog import lookup
from stages.contract import Job, Metrics, Stage
from stages.params import require_at_least, require_within


@dataclass(frozen=True)
class Params:
    """The section `distill` of params.yaml; comments and units stand there."""

    student: str
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
    text_only_control: bool
    seed: int

    def __post_init__(self) -> None:
        require_at_least(
            1, steps=self.steps, batch_rows=self.batch_rows, patch_rows=self.patch_rows
        )
        require_at_least(0, ce_weight=self.ce_weight, anchor_weight=self.anchor_weight)
        require_at_least(0, kd_weight=self.kd_weight, seed=self.seed)
        require_within(1e-8, 1.0, learning_rate=self.learning_rate, patch_ridge=self.patch_ridge)
        require_within(0.0, 0.5, warmup=self.warmup)
        require_within(0.1, 20.0, temperature=self.temperature)
        require_within(1e-3, 1e3, clip=self.clip)
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
    from stages.distill.student import choose_blocks
    from stages.distill.training import Lesson, train
    from stages.formats.importance import read_importance, read_subspaces
    from stages.formats.targets import TeacherTargets
    from stages.formats.tokens import read_all_rows

    teacher_name, targets_folder = only_teacher(job.inputs("extract"))
    targets = TeacherTargets(targets_folder)
    check_temperature(params, targets.header.samples)
    profile = job.inputs("profile")[teacher_name]
    importance = read_importance(profile)
    prefix = targets.header.prefix_blocks
    dropped = choose_blocks(importance, lookup("students", params.student).drop_blocks, prefix)
    location = locate(teacher_name)
    teacher, tokenizer = open_model(location), open_tokenizer(location)
    rows = torch.from_numpy(read_all_rows(job.input("prepare"), "calibration", params.seed))
    student, explained = build(teacher, dropped, rows[: params.patch_rows], params, job)
    save_student(student, tokenizer, job.output / "before_training")

    lesson = Lesson(
        targets=targets,
        subspaces=read_subspaces(profile),
        prefix=prefix,
        dropped=dropped,
        harms=[block.harm for block in importance],
        params=params,
    )
    full = Weights(params.kd_weight, params.ce_weight, params.anchor_weight, params.temperature)
    untrained = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    train(student, lesson, full, job, "student")
    save_student(student, tokenizer, job.output / "student")
    if params.text_only_control:
        student.load_state_dict(untrained)
        train(student, lesson, Weights(0.0, 1.0, 0.0, 1.0), job, "text_only")
        save_student(student, tokenizer, job.output / "text_only")

    facts = {"teacher": teacher_name, "dropped": dropped, "gap_explained": explained}
    (job.output / "student.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    return {
        "blocks": len(dissect(student).blocks),
        "blocks_dropped": len(dropped),
        "parameters": sum(p.numel() for p in student.parameters()),
        "parameters_of_teacher": sum(p.numel() for p in teacher.parameters()),
        "gap_explained": sum(explained) / len(explained),
        "tokens_trained": params.steps * params.batch_rows * targets.header.row_tokens,
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


def build(teacher, dropped: list[int], rows, params: Params, job: Job) -> tuple:
    """Steps 1 and 2: the student before training, and each gap's explained residual.

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


def only_teacher(folders: dict) -> tuple:
    """The one teacher there is; several at once are for a later version, and said so."""
    if len(folders) != 1:
        raise ValueError(
            f"distill learns from one teacher so far; there are targets of {', '.join(folders)}. "
            "Choose one: ./run_pipeline.sh --models NAME"
        )
    return next(iter(folders.items()))


def save_student(student, tokenizer, folder) -> None:
    """Write a folder that stock transformers opens: safetensors in bfloat16, config, tokenizer."""
    import torch

    copy.deepcopy(student).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


STAGE = Stage("distill", Params, run, check_among)
