"""The training loop of distill: one for the student, one for its control."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from modeling.blocks import dissect
from stages.contract import Job
from stages.distill.objective import AnchorMaps, Objective, Weights, place_anchors, trainable
from stages.formats.importance import Subspaces
from stages.formats.targets import TeacherTargets
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


def train(student: PreTrainedModel, lesson: Lesson, weights: Weights, job: Job, phase: str) -> None:
    """Train everything behind the prefix, in place; goes on from a checkpoint of this phase.

    Deterministic: batch n follows from the seed and n alone.
    """
    params = lesson.params
    anchors = place_anchors(lesson.targets.header.anchors, lesson.dropped, lesson.harms)
    maps = AnchorMaps(anchors if weights.anchor else [], student.config.hidden_size)
    named = trainable(student, lesson.prefix, maps)
    state = job.resume(TrainState(named, params.learning_rate, params.steps), phase)
    objective = Objective(student, lesson.prefix, anchors, maps, lesson.subspaces, weights)
    for batch in lesson.targets.batches(params.batch_rows, params.steps, params.seed, state.step):
        loss = objective(batch)
        loss.total.backward()
        norm = state.update(params.warmup, params.clip)
        job.step_done(
            state, state.step, params.steps, phase,
            kl=loss.kl, ce=loss.ce, anchor=loss.anchor, gradient_norm=norm,
        )  # fmt: skip
    for block in dissect(student).blocks:
        block.requires_grad_(False)
