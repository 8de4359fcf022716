"""Next tokens drawn from a model's whole distribution, from logits that come in pieces.

Random Sampling Knowledge Distillation (Anshumann 2025, "Sparse Logit Sampling", arXiv 2503.16870)
keeps, of each position, tokens drawn with replacement from the teacher's p instead of its top k.
The counts / S of S draws are an unbiased estimate of p, and cross-entropy is linear in p: so the
gradient is unbiased, too, which that of a top k is not.

A draw is a reservoir of one (Chao 1982): going through the vocabulary, token i with the weight
w_i = exp(logit_i) takes the place of the token before with probability w_i / W_i, where W_i =
w_1 + ... + w_i. It stays with probability prod_{j > i} (1 - w_j / W_j) = W_i / W_n; so token i is
drawn with probability w_i / W_n = p_i, and W_n need not be known beforehand. That holds for pieces
of the vocabulary as it does for tokens.

The coins are the points of a Poisson process of rate 1 on the axis of log W, one process a draw.
There is none in (log W_i-1, log W_i] with probability W_i-1 / W_i, as it should be; so the draw is
the token in which the last point below log W_n lies. Points follow from the seed, the absolute
position, the draw and the place on the axis by a hash (SplitMix64, Steele 2014), and from nothing
else: a draw depends on the logits alone, not on batches, not on interruptions, and on the size of
the pieces only as far as the logits' own rounding does.

Letters: N positions, V vocabulary of a piece, S draws a position.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from modeling.answers import GROUP, ROWS, fold_head, head_not_finite
from modeling.streaming import Passage

DRAW_BYTES = 16  # that a draw takes while its position is under way
NOWHERE = -math.inf
FAR = 2.0**40  # logits so far apart that two different ones are nothing and all
GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # as the signed integers of torch


@dataclass
class Samples:
    """S draws at each of N positions, over the pieces of vocabulary seen so far.

    ids (N, S) int64; log_weights (N, S) float64: their logits; log_mass (N,) float64: log W.
    """

    ids: Tensor
    log_weights: Tensor
    log_mass: Tensor

    @classmethod
    def none_yet(cls, keys: Tensor) -> "Samples":
        """Before any piece, for keys (N, S)."""
        nowhere = torch.full(keys.shape, NOWHERE, dtype=torch.float64, device=keys.device)
        return cls(torch.zeros_like(keys), nowhere, nowhere[:, 0])

    def see(self, logits: Tensor, keys: Tensor, first_id: int) -> "Samples":
        """Take in the logits (N, V) of the tokens `first_id` and following."""
        parts = [_sums(part) for part in logits.split(ROWS)]
        highest, summed = (torch.cat(column) for column in zip(*parts, strict=True))
        log_mass = torch.logaddexp(self.log_mass, highest + summed[:, -1].log())
        point = last_point(keys, self.log_mass, log_mass)
        new = point > self.log_mass[:, None]
        into = (point - highest[:, None]).exp() - (self.log_mass - highest).exp()[:, None]
        columns = (logits, highest, summed, torch.where(new, into, 0.0))
        parts = [_pick(*part) for part in zip(*(c.split(ROWS) for c in columns), strict=True)]
        ids = torch.cat(parts)
        log_weights = torch.where(new, logits.gather(-1, ids).double(), self.log_weights)
        return Samples(torch.where(new, ids + first_id, self.ids), log_weights, log_mass)

    @classmethod
    def together(cls, parts: list["Samples"]) -> "Samples":
        """Of all positions, from those of some."""
        columns = zip(*((part.ids, part.log_weights, part.log_mass) for part in parts), strict=True)
        return cls(*(torch.cat(column) for column in columns))

    def counted(self) -> tuple[Tensor, Tensor, Tensor]:
        """Each position's different tokens (E,), how often each came (E,), and how many (N,).

        One position behind the other, E tokens in all; int64.
        """
        ids = self.ids.sort(-1).values
        new = torch.ones_like(ids, dtype=torch.bool)
        new[:, 1:] = ids[:, 1:] != ids[:, :-1]
        starts = new.flatten().nonzero()[:, 0]
        counts = torch.diff(starts, append=starts.new_tensor([ids.numel()]))
        return ids[new], counts, new.sum(-1)

    def mean_log_prob(self) -> Tensor:
        """The mean log-probability of each position's draws, (N,) float64: minus an entropy."""
        return self.log_weights.mean(-1) - self.log_mass


def read_samples(passage: Passage, draws: int, seed: int, first: int) -> Iterator[Samples]:
    """Give each batch's samples, when a passage has run up to the head; positions flattened.

    first: the absolute number of the passage's first position. Raises NotFinite.
    """

    def step(before: Samples | None, logits: Tensor, first_id: int, place: int) -> Samples:
        positions = torch.arange(len(logits), device=logits.device) + (first + place)
        keys = draw_keys(seed, positions, draws)
        return (before or Samples.none_yet(keys)).see(logits, keys, first_id)

    for parts in fold_head(passage, step):
        samples = Samples.together(parts)
        if not torch.isfinite(samples.log_mass).all():
            raise head_not_finite(passage)
        yield samples


def draw_keys(seed: int, positions: Tensor, draws: int) -> Tensor:
    """What tells each draw's process from all others: positions (N,) int64 -> (N, S) int64."""
    numbers = torch.arange(draws, device=positions.device)
    return _hash(_hash(_hash(torch.full_like(positions, seed)) + positions)[:, None] + numbers)


def last_point(keys: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The last point in (low, high] of the Poisson processes of keys (N, S); else NOWHERE.

    low, high (N,) float64 -> (N, S) float64. In each cell of the axis, (c, c + 1], points come
    down from its top at distances that are exponential; so each cell is on its own. Where `high` is
    beyond FAR, float64 tells no places apart, and it is itself the point.
    """
    shape = keys.shape
    low, high = (bound[:, None].expand(shape).flatten() for bound in (low, high))
    near = high.abs() < FAR
    found = torch.where(~near & (high > low), high, NOWHERE)
    searching = near.nonzero()[:, 0]
    keys, low, high = (column[searching] for column in (keys.flatten(), low, high))
    cell = high.ceil() - 1
    at, turn = cell + 1, torch.zeros_like(keys)
    while len(searching):
        at = at - _exponential(keys, cell.long(), turn)
        beyond = at <= cell  # no further point in this cell; on to the top of the next
        hit = ~beyond & (at <= high) & (at > low)
        found[searching[hit]] = at[hit]
        at, turn = torch.where(beyond, cell, at), torch.where(beyond, 0, turn + 1)
        cell = torch.where(beyond, cell - 1, cell)
        on = ~hit & (at > low)
        searching, keys, low, high, cell, at, turn = (
            column[on] for column in (searching, keys, low, high, cell, at, turn)
        )
    return found.view(shape)


def _sums(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The highest logit (n,) and running sums over groups of exp(logit - highest), (n, G); float64.

    A group is summed in float32, which is as exact as its powers are.
    """
    highest = logits.amax(-1).float().clamp_min(torch.finfo(torch.float32).min)
    powers = (logits.float() - highest[:, None]).exp_()
    groups = pad(powers, (0, -powers.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
    return highest.double(), groups.sum(-1).double().cumsum(-1)


def _pick(logits: Tensor, highest: Tensor, summed: Tensor, mass: Tensor) -> Tensor:
    """The tokens (n, S) in which masses (n, S) of a piece fall, counted from its first token."""
    group, mass = _find(summed, mass)
    tokens = (group * GROUP)[..., None] + torch.arange(GROUP, device=logits.device)  # (n, S, 64)
    inside = tokens < logits.shape[-1]
    tokens = tokens.clamp_max(logits.shape[-1] - 1)
    around = logits.gather(-1, tokens.flatten(1)).view(tokens.shape)
    powers = (around.float() - highest.float()[:, None, None]).exp_() * inside
    place, _ = _find(powers.double().cumsum(-1), mass[..., None])
    return tokens.gather(-1, place)[..., 0]


def _find(summed: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """Where a mass falls in running sums (..., G), and how far into that part: (..., S) each.

    Rounding may carry a mass beyond the end, or to where a part of no mass begins; never a draw.
    """
    end = torch.nextafter(summed[..., -1:], torch.zeros_like(summed[..., -1:]))
    mass = mass.clamp_min(0.0).minimum(end).contiguous()
    place = torch.searchsorted(summed, mass, right=True).clamp_max(summed.shape[-1] - 1)
    sums_before = pad(summed, (1, 0)).gather(-1, place)
    return place, mass - sums_before


def _exponential(keys: Tensor, cell: Tensor, turn: Tensor) -> Tensor:
    """Exponential distances, float64, from 53 bits of a hash."""
    bits = (_hash(_hash(keys + cell) + turn) >> 11) & ((1 << 53) - 1)
    return -((bits.double() + 0.5) * 2.0**-53).log()


def _hash(x: Tensor) -> Tensor:
    """SplitMix64 of int64, whose products wrap around."""
    x = x + GOLDEN
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * (factor - (1 << 64))
    return x ^ ((x >> 31) & ((1 << 33) - 1))
