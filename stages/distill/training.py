"""The training loop of distill: one for the student, one for its control."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from modeling.protection import Bases
from stages.contract import Job
from stages.distill.objective import AnchorMaps, Objective, Weights, place_anchors, trainable
from stages.formats.importance import Subspaces
from stages.formats.targets import Batch, TeacherTargets
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
        p = self.params
        yield from self.targets.batches(p.batch_rows, p.steps, p.seed, start, self.held_back)


def train(
    student: PreTrainedModel,
    lesson: Lesson,
    weights: Weights,
    job: Job,
    phase: str,
    bases: Bases | None = None,
) -> None:
    """Train everything behind the prefix, in place; goes on from a checkpoint of this phase.

    Deterministic: batch n follows from the seed and n alone. With bases, only the weights whose
    inputs they protect are trained, outside of what is protected; norms and biases stay.
    What is trained is left without gradients, frozen.
    """
    params = lesson.params
    anchors = place_anchors(lesson.targets.header.anchors, lesson.dropped, lesson.harms)
    maps = AnchorMaps(anchors if weights.anchor else [], student.config.hidden_size)
    named = trainable(student, lesson.prefix, maps)
    if bases:
        named = [(name, p) for name, p in named if name.removesuffix(".weight") in bases]
    state = job.resume(TrainState(named, params.learning_rate, params.steps, bases), phase)
    objective = Objective(student, lesson.prefix, anchors, maps, lesson.subspaces, weights)
    for batch in lesson.batches(state.step):
        loss = objective(batch)
        loss.total.backward()
        for matrix in maps.parameters():  # of a batch without anchors, where teachers are mixed
            matrix.grad = torch.zeros_like(matrix) if matrix.grad is None else matrix.grad
        norm = state.update(params.warmup, params.clip)
        job.step_done(
            state, state.step, params.steps, phase,
            kl=loss.kl, ce=loss.ce, anchor=loss.anchor, gradient_norm=norm,
        )  # fmt: skip
    for _, parameter in trainable(student, lesson.prefix, maps):
        parameter.requires_grad_(False)
