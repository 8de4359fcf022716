"""The training loop of distill: one for the student, one for its control."""

from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from modeling.blocks import dissect
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
    """What a student is taught from; the same for the student and its control."""

    targets: TeacherTargets
    subspaces: Subspaces
    prefix: int
    dropped: list[int]
    harms: list[float]
    params: "Params"


def train(
    student: PreTrainedModel, lesson: Lesson, weights: Weights, job: Job, phase: str
) -> list[Rollback]:
    """Train everything behind the prefix, in place; goes on from a checkpoint of this phase.

    Deterministic: batch n follows from the seed and n alone. Gives how often, and why, training was
    taken back (stages/recovery.py).
    """
    params = lesson.params
    anchors = place_anchors(lesson.targets.header.anchors, lesson.dropped, lesson.harms)
    maps = AnchorMaps(anchors if weights.anchor else [], student.config.hidden_size)
    named = trainable(student, lesson.prefix, maps)
    training = TrainState(named, params.learning_rate, params.steps)
    limits = Limits(params.spike, params.regression)
    recovery = job.resume(Recovery(training, limits, job.folder / "best" / phase), phase)
    objective = Objective(student, lesson.prefix, anchors, maps, lesson.subspaces, weights)
    validation = list(lesson.targets.first(params.validation_rows, params.batch_rows))
    if training.step == 0:
        recovery.begin(_validate(objective, validation))
    for batch in lesson.targets.batches(
        params.batch_rows, params.steps, params.seed, training.step, params.validation_rows
    ):
        metrics, reason = _learn(objective, batch, recovery, params)
        if reason is None and _is_due(training.step, params):
            metrics["validation"] = _validate(objective, validation)
            reason = recovery.validated(metrics["validation"])
        if reason is not None:
            back = recovery.roll_back(reason)
            job.say(f"{phase}: back from step {back.step} to {back.to_step}: {reason}")
            metrics["rollbacks"] = len(recovery.rollbacks)
        job.step_done(recovery, training.step, params.steps, phase, **metrics)
    for block in dissect(student).blocks:
        block.requires_grad_(False)
    return recovery.rollbacks


def _learn(
    objective: Objective, batch: Batch, recovery: Recovery, params: "Params"
) -> tuple[dict[str, float], str | None]:
    """One step: what was measured, or why the batch was passed over."""
    loss = objective(batch)
    reason = recovery.refuses(loss.total.item())
    if reason is None:
        loss.total.backward()
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
