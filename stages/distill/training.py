"""The training loop of distill: one for the student, one for its control."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modeling.blocks import dissect
from modeling.protection import Bases
from stages.contract import Job
from stages.distill.objective import (
    Anchor,
    AnchorMaps,
    Objective,
    Weights,
    pair_by_depth,
    place_anchors,
    trainable,
)
from stages.formats.importance import Subspaces
from stages.formats.targets import Batch, TeacherTargets
from stages.recovery import Limits, Recovery, Rollback
from stages.training import TrainState

if TYPE_CHECKING:
    from stages.distill.stage import Params


@dataclass(frozen=True)
class Lesson:
    """What a student is taught from; the same for the student and its control.

    prefix: first blocks that are the teacher's own.  dropped: of the teacher's blocks; None where
    the student is a new network.  harms: of the teacher's blocks.
    held_back: of the last rows, which are not taught, so that they can be measured on.
    lift: (D_teacher, D_student), where the anchors' maps start, of a student with an embedding of
    its own, which learns as its head does; None where both are the teacher's and stay.
    """

    targets: TeacherTargets
    subspaces: Subspaces
    prefix: int
    dropped: list[int] | None
    harms: list[float]
    params: "Params"
    held_back: int = 0
    lift: Tensor | None = None

    def anchors(self, student: PreTrainedModel) -> list[Anchor]:
        """Which of the student's blocks are compared with which of the teacher's."""
        blocks = self.targets.header.anchors
        if self.dropped is None:
            return pair_by_depth(blocks, len(dissect(student).blocks), self.harms)
        return place_anchors(blocks, self.dropped, self.harms)

    def trained(self, student: PreTrainedModel, maps: AnchorMaps) -> list[tuple[str, nn.Parameter]]:
        """What learns, by name."""
        return trainable(student, self.prefix, maps, vocabulary=self.lift is not None)

    def batches(self, start: int) -> Iterator[Batch]:
        """Batches from step `start` on, each of which follows from the seed and its step alone."""
        yield from self.taught(self.targets, start)

    def taught(self, targets: TeacherTargets, start: int) -> Iterator[Batch]:
        """The same of any teacher's targets: rows kept for validation or held back are left out."""
        p = self.params
        yield from targets.batches(
            p.batch_rows, p.steps, p.seed, start, p.validation_rows, self.held_back
        )

    def replays(self, start: int) -> Iterator[Batch | None]:
        """What is repeated of earlier lessons beside each batch from `start` on; endless."""
        yield from itertools.repeat(None)

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
    anchors = lesson.anchors(student)
    start = student.config.hidden_size if lesson.lift is None else lesson.lift
    maps = AnchorMaps(anchors if weights.anchor else [], start)
    named = lesson.trained(student, maps)
    if bases:
        named = [(name, p) for name, p in named if name.removesuffix(".weight") in bases]
    training = TrainState(named, params.learning_rate, params.steps, bases)
    limits = Limits(params.spike, params.regression)
    recovery = job.resume(Recovery(training, limits, job.folder / "best" / phase), phase)
    objective = Objective(student, lesson.prefix, anchors, maps, lesson.subspaces, weights)
    validation = list(lesson.validation())
    if training.step == 0:
        recovery.begin(_validate(objective, validation))
    passes = lesson.batches(training.step), lesson.replays(training.step)
    for batch, replay in zip(*passes, strict=False):
        metrics, reason = _learn(objective, batch, replay, recovery, params)
        if reason is None and _is_due(training.step, params):
            metrics["validation"] = _validate(objective, validation)
            reason = recovery.validated(metrics["validation"])
        if reason is not None:
            back = recovery.roll_back(reason)
            job.say(f"{phase}: back from step {back.step} to {back.to_step}: {reason}")
            metrics["rollbacks"] = len(recovery.rollbacks)
        job.step_done(recovery, training.step, params.steps, phase, **metrics)
    for _, parameter in lesson.trained(student, maps):
        parameter.requires_grad_(False)
    return recovery.rollbacks


def _learn(
    objective: Objective,
    batch: Batch,
    replay: Batch | None,
    recovery: Recovery,
    params: "Params",
) -> tuple[dict[str, float], str | None]:
    """One step: what was measured of its own batch, or why it was passed over."""
    loss = objective(batch)
    reason = recovery.refuses(loss.total.item())
    if reason is None:
        loss.total.backward()
        if replay is not None:  # each of its rows counts as much as one of the batch
            (objective(replay).total * (len(replay.tokens) / len(batch.tokens))).backward()
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
