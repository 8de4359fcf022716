"""The training loop of distill: one for the student, one for its control."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from modeling.fast_path import fast_path
from modeling.protection import Bases
from stages.contract import Job
from stages.distill.objective import AnchorMaps, Objective, Weights, place_anchors, trainable
from stages.formats.importance import Subspaces
from stages.formats.targets import Batch, TeacherTargets
from stages.recovery import Limits, Recovery, Rollback
from stages.training import TrainState

if TYPE_CHECKING:
    from stages.distill.stage import Params


@dataclass(frozen=True)
class Lesson:
    """What a student is taught from; the same for the student and its control.

    held_back: of the last rows, which are not taught, so that they can be measured on.
    """

    targets: TeacherTargets
    subspaces: Subspaces
    prefix: int
    dropped: list[int]
    harms: list[float]
    params: "Params"
    held_back: int = 0

    def batches(self, start: int) -> Iterator[Batch]:
        """Batches from step `start` on, each of which follows from the seed and its step alone."""
        yield from self.taught(self.targets, start)

    def taught(self, targets: TeacherTargets, start: int) -> Iterator[Batch]:
        """The same of any teacher's targets: rows kept for validation or held back are left out."""
        p = self.params
        yield from targets.batches(
            p.batch_rows, p.steps, p.seed, start, p.validation_rows, self.held_back
        )

    def validation(self) -> Iterator[Batch]:
        """Rows that are never taught, to notice when training goes wrong."""
        yield from self.targets.first(self.params.validation_rows, self.params.batch_rows)


def train(
    student: PreTrainedModel,
    lesson: Lesson,
    weights: Weights,
    job: Job,
    phase: str,
    bases: Bases | None = None,
) -> list[Rollback]:
    """Train everything behind the prefix, in place; goes on from a checkpoint of this phase.

    Deterministic: batch n follows from the seed and n alone. With bases, only the weights whose
    inputs they protect are trained, outside of what is protected; norms and biases stay. Gives how
    often, and why, training was taken back (stages/recovery.py).
    What is trained is left without gradients, frozen.
    """
    params = lesson.params
    anchors = place_anchors(lesson.targets.header.anchors, lesson.dropped, lesson.harms)
    maps = AnchorMaps(anchors if weights.anchor else [], student.config.hidden_size)
    named = trainable(student, lesson.prefix, maps)
    if bases:
        named = [(name, p) for name, p in named if name.removesuffix(".weight") in bases]
    training = TrainState(named, params.learning_rate, params.steps, bases)
    limits = Limits(params.spike, params.regression)
    recovery = job.resume(Recovery(training, limits, job.folder / "best" / phase), phase)
    objective = Objective(student, lesson.prefix, anchors, maps, lesson.subspaces, weights)
    validation = list(lesson.validation())
    with fast_path(student, job.say) if params.fast_path else nullcontext():
        if training.step == 0:
            recovery.begin(_validate(objective, validation))
        for batch in lesson.batches(training.step):
            metrics, reason = _learn(objective, batch, recovery, params)
            if reason is None and _is_due(training.step, params):
                metrics["validation"] = _validate(objective, validation)
                reason = recovery.validated(metrics["validation"])
            if reason is not None:
                back = recovery.roll_back(reason)
                job.say(f"{phase}: back from step {back.step} to {back.to_step}: {reason}")
                metrics["rollbacks"] = len(recovery.rollbacks)
            job.step_done(recovery, training.step, params.steps, phase, **metrics)
    for _, parameter in trainable(student, lesson.prefix, maps):
        parameter.requires_grad_(False)
    return recovery.rollbacks


def _learn(
    objective: Objective, batch: Batch, recovery: Recovery, params: "Params"
) -> tuple[dict[str, float], str | None]:
    """One step: what was measured, or why the batch was passed over."""
    loss = objective(batch)
    reason = recovery.refuses(loss.total.item())
    if reason is None:
        loss.total.backward()
        for matrix in objective.maps.parameters():  # of a mixed batch without anchors
            matrix.grad = torch.zeros_like(matrix) if matrix.grad is None else matrix.grad
        try:
            norm = recovery.state.update(params.warmup, params.clip)
        except FloatingPointError as error:
            reason = str(error)
    if reason is not None:
        recovery.state.pass_over()
        return {}, reason
    parts = {"kl": loss.kl, "ce": loss.ce, "anchor": loss.anchor, "gradient_norm": norm}
    return parts, None


def _is_due(step: int, params: "Params") -> bool:
    return step % params.validate_every == 0 or step == params.steps


@torch.no_grad()
def _validate(objective: Objective, batches: list[Batch]) -> float:
    """The mean loss of rows that are never trained on."""
    return mean(objective(batch).total.item() for batch in batches)
