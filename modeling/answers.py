"""A model's most likely next tokens and the mass of all others, from logits that come in pieces.

The vocabulary is taken a piece at a time, so that neither the whole output head nor the logits of a
whole batch need be in memory, and each piece of logits is looked at while it is in the cache.

Letters: N tokens, V vocabulary of a piece, K tokens kept.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from modeling.losses import TINY, SparseTargets
from modeling.streaming import Forward, NotFinite, Passage, linear_head

TOKENS = 512  # positions whose logits are computed at a time
ROWS = 32  # of logits looked at in one go: 6 MB at V = 49,152
GROUP = 64  # neighbouring tokens that share one maximum

State = TypeVar("State")


@dataclass
class Answers:
    """The K highest logits of N positions, over the pieces of vocabulary seen so far.

    ids (N, K) int64; top (N, K) float32 logits, highest first; rest (N,) float32, the log of the
    summed exponentials of all others, less the highest logit: large logits cost no precision.
    Fewer than K, while there were fewer tokens.
    """

    ids: Tensor
    top: Tensor
    rest: Tensor

    @classmethod
    def of(cls, logits: Tensor, k: int, first_id: int = 0) -> "Answers":
        """From logits (N, V) of the tokens `first_id` and following."""
        parts = [_look(part, k) for part in logits.split(ROWS)]
        ids, top, rest = (torch.cat(column) for column in zip(*parts, strict=True))
        return cls(ids + first_id, top, rest)

    @classmethod
    def together(cls, parts: list["Answers"]) -> "Answers":
        """Of all positions, from those of some."""
        columns = zip(*((part.ids, part.top, part.rest) for part in parts), strict=True)
        return cls(*(torch.cat(column) for column in columns))

    def join(self, other: "Answers", k: int) -> "Answers":
        """Take in another piece of the vocabulary, and keep k."""
        both = torch.cat([self.top, other.top], -1)
        top, order = both.sort(dim=-1, descending=True, stable=True)
        ids = torch.cat([self.ids, other.ids], -1).gather(-1, order)
        highest = _highest(top)
        rests = [part.rest + (part.top[:, 0] - highest) for part in (self, other)]
        dropped = (top[:, k:] - highest[:, None]).logsumexp(-1)
        return Answers(ids[:, :k], top[:, :k], torch.stack([*rests, dropped]).logsumexp(0))

    def targets(self) -> SparseTargets:
        """As probabilities: log-probabilities of the K, and the mass outside them."""
        top = self.top - self.top[:, :1]
        log_z = torch.logaddexp(top.logsumexp(-1), self.rest)
        tail = (self.rest - log_z).exp().clamp_min(TINY)  # not 1 - sum: that cancels
        return SparseTargets(self.ids, top - log_z[:, None], tail)


def read_answers(passage: Passage, k: int) -> Iterator[Answers]:
    """Give each batch's answers, when a passage has run up to the head; positions flattened.

    Raises NotFinite.
    """

    def step(before: Answers | None, logits: Tensor, first_id: int, _: int) -> Answers:
        here = Answers.of(logits, k, first_id)
        return here if before is None else before.join(here, k)

    for parts in fold_head(passage, step):
        answers = Answers.together(parts)
        if not torch.isfinite(answers.top[:, 0]).all():  # NaN counts as the highest
            raise head_not_finite(passage)
        yield answers


@torch.no_grad()
def fold_head(
    passage: Passage, step: Callable[[State | None, Tensor, int, int], State]
) -> Iterator[list[State]]:
    """Fold over the vocabulary, when a passage has run up to the head; a list of states a batch.

    step(state, logits, first_id, place) takes in the logits (n, V) of a piece of the vocabulary
    that begins at first_id, for n positions, the first of them at `place` among all the passage's;
    its state is None before the first piece. The head is brought once, and all batches meet each
    piece, some positions at a time.
    """
    head = linear_head(passage.model)
    if head is None:
        place = 0
        for forward in passage.forwards:
            logits = forward.output.logits.flatten(0, 1)
            yield [step(None, logits, 0, place)]
            place += len(logits)
        return
    finish, by_pieces = _after_head(passage)
    states: list[dict[int, State]] = [{} for _ in passage.forwards]  # by place
    pieces = passage.weights.head() if by_pieces else [(0, passage.weights.whole_head(), head.bias)]
    for first, weight, bias in pieces:
        place = 0
        for forward, known in zip(passage.forwards, states, strict=True):
            for x in forward.normed.flatten(0, -2).split(TOKENS):
                logits = finish(linear(x, weight, bias))
                known[place] = step(known.get(place), logits, first, place)
                place += len(x)
    for known in states:
        yield list(known.values())


def head_not_finite(passage: Passage) -> NotFinite:
    """What to raise when logits are not finite; all states before the head were found to be."""
    return NotFinite(
        f"the logits of {type(passage.model).__name__} are not finite though all its blocks' "
        "outputs are: its head or the norm before it is damaged"
    )


def logits_of(passage: Passage) -> Callable[[Forward, Tensor], Tensor]:
    """A function that gives the logits (n, V) at n of the positions of a forward at the head."""
    head = linear_head(passage.model)
    if head is None:
        return lambda forward, picks: forward.output.logits.flatten(0, -2)[picks]
    finish, _ = _after_head(passage)
    weight = passage.weights.whole_head()

    def logits(forward: Forward, picks: Tensor) -> Tensor:
        return finish(linear(forward.normed.flatten(0, -2)[picks], weight, head.bias))

    return logits


def _after_head(passage: Passage) -> tuple[Callable[[Tensor], Tensor], bool]:
    """What the model does to logits, and whether that can be done to pieces of the vocabulary."""
    head = linear_head(passage.model).weight
    finish = passage.after_head()
    probe = torch.linspace(-90, 90, head.shape[0], device=head.device, dtype=head.dtype)[None]
    done = finish(probe.clone())  # a model may write into what it is given
    if torch.equal(done, probe):
        return lambda logits: logits, True
    try:
        halves = torch.cat([finish(part.clone()) for part in probe.chunk(2, -1)], -1)
    except (RuntimeError, IndexError):  # it names tokens
        return finish, False
    return finish, torch.equal(halves, done)


def _look(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and logits of the top k, and the log of the others' sum as Answers has it, of (n, V)."""
    ids = _top_ids(logits, min(k, logits.shape[-1]))
    top, order = logits.gather(-1, ids).float().sort(dim=-1, descending=True, stable=True)
    powers = (logits.float() - _highest(top)[:, None]).exp_().scatter_(-1, ids, 0.0)
    return ids.gather(-1, order), top, powers.sum(-1).log()


def _highest(top: Tensor) -> Tensor:
    """The first column, finite though no token of a piece may be possible: (n, k) -> (n,)."""
    return top[:, 0].clamp_min(torch.finfo(top.dtype).min)


def _top_ids(logits: Tensor, k: int) -> Tensor:
    """Where the k highest of each row are, (n, V) -> (n, k), in no order.

    They lie in the k groups with the highest maxima, so only those are searched.
    """
    rows, width = logits.shape
    groups = width // GROUP
    if groups <= 2 * k:
        return logits.topk(k, -1, sorted=False).indices
    whole = logits[:, : groups * GROUP].view(rows, groups, GROUP)
    best = whole.amax(-1).topk(k, -1, sorted=False).indices  # (n, k) groups
    found = best[:, :, None] * GROUP + torch.arange(GROUP, device=logits.device)
    left_over = torch.arange(groups * GROUP, width, device=logits.device).expand(rows, -1)
    candidates = torch.cat([found.flatten(1), left_over], -1)
    picked = logits.gather(-1, candidates).topk(k, -1, sorted=False).indices
    return candidates.gather(-1, picked)
