"""A teacher's next-token distribution, said in the tokens of a student with another tokenizer.

Both read the same bytes. At a boundary b of the student's tokens let a be the last boundary of the
teacher's at or before it, and r the bytes between them, which are empty where both have b. The
teacher knows, at a, the probability p(u) of each of its tokens u. Those that begin with r and go on
beyond b say what the student's next token is: the first token w of what is left of them,

    t(w) = sum_u p(u) share(w | u, r) / sum_u p(u)     over u that begin with r and are longer

so that inside a teacher's token, too, the student is told what the teacher held for possible, given
that its token goes on there. That a teacher's token ends, or does not end, where it does is more
than the student knows there; cross-entropy is linear in t, so over texts as the teacher writes them
the gradient is that of the distribution without that knowledge.

share is 1 for the first token into which the student splits what is left of u. Where the student's
token may go on beyond u (" func" of " function"), the text decides that, not u: then shares are
counted on the rows, where the teacher's token was u and what the student's was.

Left out, and what is left made to sum to 1: tokens that stand for no text, and those that would
have been a part of the student's token before b, had they followed it (" funcs" has no "tion").

Exact for tokenizers that take the longest match, with true shares: tests enumerate all texts.
Approximate: (a) in BPE bytes behind a token can change how it is split; (b) shares are counted
without what stands before u.
Differs from GOLD (TRL) and ULD (Boizard 2024, arXiv 2402.12030): no sorting of probabilities, which
compares unlike tokens; and from Approximate Likelihood Matching (Minixhofer 2025, arXiv
2503.20083): each token has a whole distribution, not a span one probability.

Letters: n positions, V teacher tokens, S student tokens, E pairs of both.
"""

from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from modeling.token_bytes import Vocabulary

BEYOND = b"\xff\xff"  # sorts behind all that tokens go on with
PRIOR = 1.0  # how often the token that u alone splits into counts as seen


@dataclass(frozen=True)
class Before:
    """What stands before a place: the student's last token, and the bytes r of the teacher's.

    whole: whether r are whole tokens of the student.
    """

    student: int
    begun: bytes
    whole: bool = True


@dataclass(frozen=True)
class Observed:
    """What was seen on rows.

    firsts: (teacher token, length of r) -> how often each student token was next.
    neighbours: student token -> those that followed it.
    """

    firsts: Mapping[tuple[int, int], Mapping[int, int]] = field(default_factory=dict)
    neighbours: Mapping[int, Collection[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Pairs:
    """Teacher tokens that go on beyond a place, and what the student's next token may then be.

    tokens, ids: (E,) int64; shares: (E,) float32, which sum to 1 for a teacher's token.
    """

    tokens: Tensor
    ids: Tensor
    shares: Tensor


class _Sorted:
    """Tokens in the order of their bytes: those with the same beginning are a range."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        known = sorted((piece, n) for n, piece in enumerate(vocabulary.tokens) if piece)
        self.pieces = [piece for piece, _ in known]
        self.tokens = [token for _, token in known]

    def longer_than(self, begun: bytes) -> list[int]:
        """Tokens that begin with some bytes and go on."""
        if not begun:
            return self.tokens
        last = bisect_left(self.pieces, begun + BEYOND)
        first = bisect_left(self.pieces, begun + b"\0")
        return self.tokens[first:last]

    def from_start(self, piece: bytes) -> list[int]:
        """Tokens that begin with some bytes."""
        last = bisect_left(self.pieces, piece + BEYOND)
        return self.tokens[bisect_left(self.pieces, piece) : last]


@dataclass
class Translation:
    """From a teacher's tokens to a student's; what it works out it keeps."""

    teacher: Vocabulary
    student: Vocabulary
    observed: Observed = field(default_factory=Observed)

    def __post_init__(self) -> None:
        self._teacher, self._student = _Sorted(self.teacher), _Sorted(self.student)
        self._pairs: dict[tuple[bytes, bool], Pairs] = {}
        self._merged: dict[Before, Tensor] = {}
        self._never: dict[int, list[bytes]] = {}
        self._splits: dict[bytes, tuple[list[int], list[int]]] = {}

    def pairs(self, begun: bytes, whole: bool = True) -> Pairs:
        """What the student's next token may be, by the teacher's token, which has begun so."""
        if (begun, whole) not in self._pairs:
            found = [
                (token, *member)
                for token in self._teacher.longer_than(begun)
                for member in self._members(token, len(begun), whole)
            ]
            tokens, ids, shares = zip(*found, strict=True) if found else ((), (), ())
            self._pairs[begun, whole] = Pairs(
                torch.tensor(tokens, dtype=torch.int64),
                torch.tensor(ids, dtype=torch.int64),
                torch.tensor(shares, dtype=torch.float32),
            )
        return self._pairs[begun, whole]

    def merged(self, before: Before) -> Tensor:
        """Teacher tokens with which the student's last token would have been a longer one."""
        if before not in self._merged:
            found = [
                token
                for piece in self._never_after(before.student)
                for token in self._teacher.from_start(before.begun + piece)
            ]
            self._merged[before] = torch.tensor(sorted(set(found)), dtype=torch.int64)
        return self._merged[before]

    def _never_after(self, token: int) -> list[bytes]:
        """What follows a student's token only as a part of a longer one."""
        last = self.student.tokens[token]
        if token not in self._never and last:
            seen = [self.student.tokens[n] or b"" for n in self.observed.neighbours.get(token, ())]
            begun = {piece[:size] for piece in seen for size in range(1, len(piece) + 1)}
            rests = (self.student.tokens[n][len(last) :] for n in self._student.longer_than(last))
            self._never[token] = [rest for rest in rests if rest not in begun]
        return self._never.get(token, [])

    def masses(self, p: Tensor, before: Sequence[Before]) -> Tensor:
        """The student's next-token probabilities (n, S), of the teacher's p (n, V); float32.

        Rows of zeros where no token of the teacher goes on beyond the place.
        """
        p = p.clone()
        for row, place in zip(p, before, strict=True):
            row[self.merged(place)] = 0.0
        found = p.new_zeros(len(self.student.tokens), len(p))
        groups: dict[tuple[bytes, bool], list[int]] = {}
        for row, place in enumerate(before):
            groups.setdefault((place.begun, place.whole), []).append(row)
        for place, rows in groups.items():
            pairs = self.pairs(*place)
            columns = p[rows].T[pairs.tokens] * pairs.shares[:, None]  # (E, rows)
            part = p.new_zeros(len(found), len(rows)).index_add_(0, pairs.ids, columns)
            found[:, rows] = part
        return (found / found.sum(0).clamp_min(torch.finfo(p.dtype).tiny)).T

    def _members(self, token: int, begun: int, whole: bool) -> list[tuple[int, float]]:
        """Student tokens that may follow where a teacher's token has begun, and their shares."""
        counts = dict(self.observed.firsts.get((token, begun), {}))
        piece = self.teacher.tokens[token]
        first = self._next(piece, begun) if whole else self._next(piece[begun:], 0)
        if first is not None:
            counts[first] = counts.get(first, 0) + PRIOR
        total = sum(counts.values())
        return [(member, count / total) for member, count in counts.items()]

    def _next(self, piece: bytes, place: int) -> int | None:
        """The token that begins at a place of some bytes; None where the student has none there."""
        if piece not in self._splits:
            ids = self.student.split(piece)
            self._splits[piece] = ids, [0, *self.student.ends(ids).tolist()]
        ids, starts = self._splits[piece]
        return dict(zip(starts, ids, strict=False)).get(place)
