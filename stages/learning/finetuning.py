"""Train an adapter on conversations: what sft and toolformer share.

A step's loss is the mean cross-entropy of the counted tokens (supervision.py) plus, against
forgetting, a little of that of some rows of the general text which the student was distilled on: a
skill's loss is soon a hundredth of the text's, and Adam's steps are measured by the noise of both.
Logits are
made for counted tokens alone, a chunk at a time (modeling/losses.py): in a dialogue with a tool
they are less than half of all. On the fast path, what conversations begin with alike is computed
once (modeling/shared_prefixes.py), where the model allows it. A mini mixture of experts on the
model (modeling/moe.py) learns with the adapter, and adds its load-balance loss; beginnings are not
shared then, for they would count once in the balance.

Each step follows from the seed and its number; interrupted training goes on to the same bits.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from inspect import signature

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from modeling.fast_path import fast_path
from modeling.lora import Adapted, adapters_of, check_learning, trainable
from modeling.losses import text_loss
from modeling.moe import balance_loss, check_routing, find_experts
from modeling.shared_prefixes import forest_states, shares_prefixes
from stages.contract import Job
from stages.learning.course import Course
from stages.learning.recovery import Limits, Recovery, Rollback
from stages.learning.supervision import Example, Rows, SharedRows, lay_out, share, side_by_side
from stages.learning.training import TrainState


@dataclass(frozen=True)
class Lesson:
    """What an adapter learns from.

    general: (N, T) int64 rows of text; none are drawn where `course.general_rows` is 0.
    shares: what conversations begin with alike is computed once.
    """

    course: Course
    examples: list[Example]
    validation: list[Example]
    general: Tensor
    pad: int
    shares: bool = False

    def batch(self, step: int) -> list[Example]:
        """The conversations of a step: each once an epoch, in an order of its own."""
        count = self.course.batch_conversations
        places = range(step * count, (step + 1) * count)
        return [self.examples[index] for index in draw(places, len(self.examples), self._seed(0))]

    def general_batch(self, step: int) -> Tensor:
        """The rows of general text of a step, (course.general_rows, T)."""
        count = self.course.general_rows
        places = range(step * count, (step + 1) * count)
        return self.general[list(draw(places, len(self.general), self._seed(1)))]

    def laid_out(self, examples: list[Example]) -> Iterator[Rows | SharedRows]:
        """Examples in rows, as the course says."""
        if not self.shares:
            yield from lay_out(examples, self.pad, self.course.most_tokens, self.course.packing)
            return
        for group in side_by_side(examples, self.course.most_tokens):
            yield share([examples[index] for index in group])

    def _seed(self, stream: int) -> tuple[int, int]:
        return self.course.seed, stream


def draw(places: range, count: int, seed: tuple[int, ...]) -> Iterator[int]:
    """What stands at places of an endless row of permutations of `count` things."""
    order: dict[int, np.ndarray] = {}
    for place in places:
        epoch, index = divmod(place, count)
        if epoch not in order:
            order[epoch] = np.random.default_rng((*seed, epoch)).permutation(count)
        yield int(order[epoch][index])


def finetune(adapted: Adapted, lesson: Lesson, job: Job, phase: str) -> list[Rollback]:
    """Train the adapter, in place; goes on from a checkpoint of this phase.

    Gives how often, and why, training was taken back (recovery.py). Raises DeadAdapter after
    the first backward pass where a layer learns nothing.
    """
    course = lesson.course
    require_packable(adapted, course)
    named = trainable(adapted)
    training = TrainState(named, course.learning_rate, course.steps)
    limits = Limits(course.spike, course.regression)
    recovery = job.resume(Recovery(training, limits, job.folder / "best" / phase), phase)
    model = adapted.get_base_model()
    plain = course.fast_path and not course.packing and find_experts(model) is None
    lesson = replace(lesson, shares=plain and shares_prefixes(model))
    with fast_path(model, job.say) if course.fast_path else nullcontext():
        if training.step == 0:
            recovery.begin(mean_loss(model, lesson, lesson.validation))
        while training.step < course.steps:
            metrics, reason = _learn(model, named, lesson, recovery)
            if reason is None and _is_due(training.step, course):
                metrics["validation"] = mean_loss(model, lesson, lesson.validation)
                reason = recovery.validated(metrics["validation"])
            if reason is not None:
                back = recovery.roll_back(reason)
                job.say(f"{phase}: back from step {back.step} to {back.to_step}: {reason}")
            job.step_done(recovery, training.step, course.steps, phase, **metrics)
    return recovery.rollbacks


def require_packable(model: Adapted, course: Course) -> None:
    """Refuse to pack rows for a model that would run on from one example into the next."""
    forward = signature(model.get_base_model().base_model.forward)
    if course.packing and "position_ids" not in forward.parameters:
        raise ValueError(
            f"'packing' is true, but {type(model.get_base_model()).__name__} takes no positions: "
            "its state would run on from one conversation into the next; set packing to false"
        )


def _learn(
    model: PreTrainedModel, named: list, lesson: Lesson, recovery: Recovery
) -> tuple[dict[str, float], str | None]:
    """One step: its losses, or why it was passed over."""
    course, training = lesson.course, recovery.state
    batch = lesson.batch(training.step)
    counted = sum(sum(example.counted) for example in batch)
    own = general = 0.0
    for rows in lesson.laid_out(batch):
        loss = rows_loss(model, rows) / counted
        (loss + _balance(model, rows, counted)).backward()
        own += loss.item()
    if course.general_rows:
        loss = general_loss(model, lesson.general_batch(training.step))
        (course.general_weight * loss + balance_loss(model)).backward()
        general = loss.item()
    reason = recovery.refuses(own + course.general_weight * general)
    if reason is None:
        if training.step == 0:
            check_learning(adapters_of(named))
            if (experts := find_experts(model)) is not None:
                check_routing(experts)
        try:
            norm = training.update(course.warmup, course.clip)
            return {"loss": own, "general": general, "gradient_norm": norm}, None
        except FloatingPointError as error:
            reason = str(error)
    training.pass_over()
    return {}, reason


def _balance(model: PreTrainedModel, rows: Rows | SharedRows, counted: int) -> Tensor | float:
    """What a mixture of experts adds to the loss of rows, by their share of the counted tokens."""
    if isinstance(rows, SharedRows):
        return 0.0  # only of models without a mixture
    return rows.counted.sum().item() / counted * balance_loss(model, rows.real)


def rows_loss(model: PreTrainedModel, rows: Rows | SharedRows) -> Tensor:
    """The sum of the counted tokens' cross-entropies, in nats."""
    head = model.get_output_embeddings().weight
    states, labels = _counted(model, rows)
    return text_loss(states.to(head.dtype), head, labels) * len(labels)


def _counted(model: PreTrainedModel, rows: Rows | SharedRows) -> tuple[Tensor, Tensor]:
    """The states that counted tokens are predicted from, (M, D), and these tokens, (M,)."""
    if isinstance(rows, SharedRows):
        states = forest_states(model, rows.forest)
        before = rows.before.to(states.device)
        return states.index_select(0, before), rows.labels.to(states.device)
    positions = {} if _is_plain(rows) else {"position_ids": rows.positions.to(model.device)}
    tokens = rows.tokens.to(model.device)
    hidden = model.base_model(tokens, use_cache=False, **positions).last_hidden_state
    counted = rows.counted[:, 1:].to(model.device)
    return hidden[:, :-1][counted], tokens[:, 1:][counted]


def _is_plain(rows: Rows) -> bool:
    """Whether each row is one example: positions are then as every model counts them itself."""
    return bool((rows.positions == torch.arange(rows.positions.shape[1])).all())


def general_loss(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Mean cross-entropy in nats of rows of text (R, T)."""
    tokens = tokens.to(model.device)
    hidden = model.base_model(tokens, use_cache=False).last_hidden_state
    head = model.get_output_embeddings().weight
    return text_loss(hidden[:, :-1].flatten(0, 1).to(head.dtype), head, tokens[:, 1:].flatten())


@torch.no_grad()
def mean_loss(model: PreTrainedModel, lesson: Lesson, examples: list[Example]) -> float:
    """Mean cross-entropy of the counted tokens of examples, in nats."""
    losses = [rows_loss(model, rows).item() for rows in lesson.laid_out(examples)]
    return sum(losses) / sum(sum(example.counted) for example in examples)


def _is_due(step: int, course: Course) -> bool:
    return step % course.validate_every == 0 or step == course.steps
