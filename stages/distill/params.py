"""What can be set of distill, and which settings contradict each other."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from registry.catalog import lookup
from stages.params import require_at_least, require_one_of, require_within

SCHEDULES = ("mixed", "sequence")
CONTROLS = {  # what differs in a control's loss
    "text_only": {"kd": 0.0, "ce": 1.0, "anchor": 0.0, "temperature": 1.0},
    "without_anchors": {"anchor": 0.0},
    "without_text": {"ce": 0.0},
    "without_answers": {"kd": 0.0},
}
OPTIMIZERS = ("adamw", "adamw_8bit")  # of stages/learning/optimizers.py, which imports torch


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
    fast_path: bool
    schedule: str
    teacher_order: tuple[str, ...]
    teacher_weights: tuple[float, ...]
    protect: bool
    replay_share: float
    protect_share: float
    protect_rows: int
    retention_rows: int
    processes: int
    gradient_checkpointing: bool
    optimizer: str
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
        require_at_least(1, processes=self.processes)
        require_one_of(OPTIMIZERS, optimizer=self.optimizer)
        if self.batch_rows % self.processes:
            raise ValueError(
                f"'batch_rows' is {self.batch_rows}, which 'processes', {self.processes}, does not "
                "divide; each process takes as many rows of a batch as the others"
            )
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
