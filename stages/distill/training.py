"""The training loop of distill: one for the student, one for its control.

On a GPU the host waits for it twice a step: for the loss, and for the gradients' norm. In several
processes each learns from its share of every batch's rows; the loss is a mean over tokens, and all
shares are alike, so that the mean of their gradients is the whole batch's, up to rounding.
"""

import itertools
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modeling.blocks import dissect
from modeling.fast_path import fast_path
from modeling.protection import Bases
from stages.contract import Job
from stages.distill.feeding import feed
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
from stages.learning.recovery import Limits, Recovery, Rollback
from stages.learning.training import TrainState
from stages.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from stages.distill.params import Params


@dataclass(frozen=True)
class Lesson:
    """What a student is taught from; the same for the student and its control.

    prefix: first blocks that are the teacher's own.  dropped: of the teacher's blocks; None where
    the student is a new network.  harms: of the teacher's blocks.
    held_back: of the last rows, which are not taught, so that they can be measured on.
    lift: (D_teacher, D_student), where the anchors' maps start, of a student with an embedding of
    its own, which learns as its head does; None where both are the teacher's and stay.
    ranks: who shares the rows of each batch.
    """

    targets: TeacherTargets
    subspaces: Subspaces
    prefix: int
    dropped: list[int] | None
    harms: list[float]
    params: "Params"
    held_back: int = 0
    lift: Tensor | None = None
    ranks: Ranks = ALONE

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
            p.batch_rows, p.steps, p.seed, start, p.validation_rows, self.held_back,
            self.ranks.share(p.batch_rows),
        )  # fmt: skip

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
    often, and why, training was taken back (stages/learning/recovery.py).
    What is trained is left without gradients, frozen.
    """
    params, ranks = lesson.params, lesson.ranks
    bases = ranks.of_lead(bases)
    anchors = lesson.anchors(student)
    start = student.config.hidden_size if lesson.lift is None else lesson.lift
    maps = AnchorMaps(anchors if weights.anchor else [], start).to(student.device)
    named = lesson.trained(student, maps)
    if bases:
        named = [(name, p) for name, p in named if name.removesuffix(".weight") in bases]
    rate, steps = params.learning_rate, params.steps
    training = TrainState(named, rate, steps, bases, params.optimizer, ranks)
    limits = Limits(params.spike, params.regression)
    recovery = Recovery(training, limits, job.folder / "best" / phase, ranks.leads)
    recovery = job.resume(recovery, phase)
    objective = Objective(
        student, lesson.prefix, anchors, maps, lesson.subspaces, weights,
        params.gradient_checkpointing,
    )  # fmt: skip
    validation = list(lesson.validation())
    batches = feed(lesson.batches(training.step), objective.device)
    with fast_path(student, job.say) if params.fast_path else nullcontext():
        if training.step == 0:
            recovery.begin(_validate(objective, validation, ranks))
        for batch, replay in zip(batches, lesson.replays(training.step), strict=False):
            metrics, reason = _learn(objective, batch, replay, recovery, params, ranks)
            if reason is None and _is_due(training.step, params):
                metrics["validation"] = _validate(objective, validation, ranks)
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
    ranks: Ranks,
) -> tuple[dict[str, float], str | None]:
    """One step: what was measured of its own batch, or why it was passed over."""
    loss = objective(batch)
    whole, kl, ce, anchor = ranks.means([loss.total.item(), loss.kl, loss.ce, loss.anchor])
    reason = recovery.refuses(whole)
    if reason is None:
        loss.total.backward()
        if replay is not None:  # each of its rows counts as much as one of the batch
            share = len(replay.tokens) / (len(batch.tokens) * ranks.count)
            (objective(replay).total * share).backward()
        for matrix in objective.maps.parameters():  # of a mixed batch without anchors
            matrix.grad = torch.zeros_like(matrix) if matrix.grad is None else matrix.grad
        try:
            norm = recovery.state.update(params.warmup, params.clip)
        except FloatingPointError as error:
            reason = str(error)
    if reason is not None:
        recovery.state.pass_over()
        return {}, reason
    return {"kl": kl, "ce": ce, "anchor": anchor, "gradient_norm": norm}, None


def _is_due(step: int, params: "Params") -> bool:
    return step % params.validate_every == 0 or step == params.steps


@torch.no_grad()
def _validate(objective: Objective, batches: list[Batch], ranks: Ranks) -> float:
    """The mean loss of rows that are never trained on; each process computes some batches.

    All zeros but its own, summed, are the losses of one process to the bit.
    """
    losses = [0.0] * len(batches)
    for number in range(ranks.index, len(batches), ranks.count):
        losses[number] = objective(batches[number]).total.item()
    return mean(ranks.sums(losses))
