"""What a teacher with another tokenizer says about a student's next token, from stored targets.

Both read the same bytes. Where a token ends in both (a common boundary), each has a distribution
over what comes next: the teacher over its tokens, the student over its own. They are compared on
one partition of the texts that may follow, coarse enough that both know the mass of each part:

1. A teacher token u leaves a few candidates for the student's next token: the first token that the
   student splits u's bytes into, and each longer token w that begins with u's bytes and that the
   teacher itself would begin with u. Two teacher tokens with a candidate in common cannot be told
   apart by the student's next token, nor a token's candidates by u. So a part, a *bucket*, is a
   connected component of teacher tokens and candidates; mostly it is one of each.
2. Between two common boundaries lies a *span*. Where it is one token on both sides, it is in its
   bucket. Else the teacher's bucket is dissolved: the span is a part of its own, whose mass is the
   product of its tokens' probabilities, on each side (as in Approximate Likelihood Matching,
   Minixhofer 2025, arXiv 2503.20083), and the bucket's remainder joins the tail.
3. The tail is all else: teacher tokens that were not stored, have no candidate or too many.

KL over a partition is never more than KL over the texts (data processing inequality), and with one
tokenizer on both sides the partition is the stored top-k and the tail: plain distillation.

Exact: the parts are disjoint and their masses sum to 1, on both sides. For tokenizers that take the
longest match, the candidates of u are all first tokens that a text beginning with u can have, and
so the masses of buckets are exact for k = V.
Approximate: (a) in BPE bytes behind a token can change how it is split; (b) teacher tokens outside
the top-k count as tail though some would add to a bucket: a bucket is too small by at most the
tail; (c) that a span ends at its end is itself a statement about what follows, which two tokenizers
make differently (tokenisation bias; the paper's debiasing is not built).
Differs from GOLD (TRL) and ULD (Boizard 2024, arXiv 2402.12030): no sorting of probabilities, which
compares unlike tokens, and no teacher in memory. Not covered: sampled targets, and student
positions inside a teacher's token, which learn through their span alone.

Letters: N spans, M student positions, K stored teacher tokens, C candidates a position.
"""

from dataclasses import dataclass

import numpy as np

from modeling.token_bytes import Vocabulary

MOST_CANDIDATES = 64  # of a teacher token: one with more says too little about the student's next
TAIL = -1  # label of what joins the tail
LONGEST_PART = 3  # bytes of a character that is cut
LEAST_MASS = 1e-7  # of a tail; modeling/losses.py's TINY


@dataclass(frozen=True)
class Candidates:
    """The student tokens that each teacher token leaves possible; computed once a pair.

    Those of teacher token u are ids[starts[u] : starts[u + 1]]; all ids from `starts`' last but one
    on have none, so that ids of padded embeddings may be looked up.
    """

    starts: np.ndarray  # (V_teacher + 2,) int64
    ids: np.ndarray  # (E,) int64

    def of(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For teacher tokens (n,): which of the n, and a candidate of it; (E,) each."""
        tokens = np.minimum(tokens, len(self.starts) - 2)
        first, count = self.starts[tokens], self.starts[tokens + 1] - self.starts[tokens]
        owner = np.repeat(np.arange(len(tokens)), count)
        within = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count)
        return owner, self.ids[first[owner] + within]


@dataclass(frozen=True)
class Spans:
    """Where two tokenizations of the same bytes meet: from common boundary to common boundary.

    The span n begins behind the student's token student[n] and ends with student[n + 1], and the
    same for the teacher.
    """

    student: np.ndarray  # (N + 1,) int64
    teacher: np.ndarray  # (N + 1,) int64


@dataclass(frozen=True)
class AlignedArrays:
    """Buckets of the student's next token at N common boundaries; see the module.

    ids: (N, C) int64, student tokens in buckets; -1 fills up.  groups: (N, C), bucket of each.
    masses: (N, K) float64, the teacher's a bucket; 0 for none.  tail: (N,).
    span_log_prob: (N,), of the spans that are parts of their own; -inf for others.
    """

    ids: np.ndarray
    groups: np.ndarray
    masses: np.ndarray
    tail: np.ndarray
    span_log_prob: np.ndarray

    def shares(self) -> dict[str, float]:
        """Where the teacher's mass is: buckets of one student token, of several, spans, tail."""
        sizes = np.zeros(self.masses.shape, np.int64)
        rows, columns = np.nonzero(self.ids >= 0)
        np.add.at(sizes, (rows, self.groups[rows, columns]), 1)
        count = len(self.tail)
        return {
            "one_token": float(self.masses[sizes == 1].sum() / count),
            "several_tokens": float(self.masses[sizes > 1].sum() / count),
            "spans": float(np.exp(self.span_log_prob).sum() / count),
            "tail": float(self.tail.sum() / count),
        }


def find_candidates(teacher: Vocabulary, student: Vocabulary) -> Candidates:
    """What each teacher token leaves possible for the student's next token; about 1 s a 100,000."""
    same = _by_bytes(student)
    known = _by_bytes(teacher)
    found: list[list[int]] = [[] for _ in teacher.tokens]
    for token, piece in enumerate(teacher.tokens):
        if piece:
            first = [same[piece]] if piece in same else student.split(piece)[:1]
            found[token] += first
    for token, piece in enumerate(student.tokens):
        if not piece or piece in known:
            continue
        for owner in teacher.split(piece)[:1]:
            if len(teacher.tokens[owner] or b"") < len(piece) and token not in found[owner]:
                found[owner].append(token)
    counts = [*map(len, found), 0]
    ids = [token for members in found for token in members]
    return Candidates(np.cumsum([0, *counts], dtype=np.int64), np.array(ids, dtype=np.int64))


def find_spans(student_ends: np.ndarray, teacher_ends: np.ndarray) -> Spans:
    """Spans between the boundaries that both have; of a token without bytes, the last counts.

    student_ends, teacher_ends: the byte at which each token ends, never falling. Raises ValueError
    when their last bytes are further apart than a character that the row's end cuts may be: then
    they are not of the same text.
    """
    if not 0 <= student_ends[-1] - teacher_ends[-1] <= LONGEST_PART:
        raise ValueError(
            f"the student's row has {student_ends[-1]} bytes and the teacher's {teacher_ends[-1]}; "
            "both must be of the same text"
        )
    common = np.intersect1d(student_ends, teacher_ends)
    student, teacher = (
        np.searchsorted(ends, common, side="right") - 1 for ends in (student_ends, teacher_ends)
    )
    return Spans(student.astype(np.int64), teacher.astype(np.int64))


def bucket_targets(
    candidates: Candidates,
    top: tuple[np.ndarray, np.ndarray, np.ndarray],
    first: tuple[np.ndarray, np.ndarray],
    span_log_prob: np.ndarray,
) -> AlignedArrays:
    """Turn the teacher's sparse answers at N common boundaries into buckets of student tokens.

    top: ids (N, K), log-probabilities (N, K) and the tail's mass (N,).  first: the first token of
    each span, the teacher's (N,) and the student's (N,).  span_log_prob (N,): the teacher's, of the
    spans that are more than one token on a side; -inf for the others.
    """
    ids, log_probs, tail = top
    count, k = ids.shape
    owner, node_id = candidates.of(ids.ravel())
    size = np.bincount(owner, minlength=count * k)
    label = np.tile(np.arange(k), count)
    label[(size == 0) | (size > MOST_CANDIDATES)] = TAIL
    own = span_log_prob > -np.inf
    label[(own[:, None] & (ids == first[0][:, None])).ravel()] = TAIL

    width = int(max(node_id.max(initial=0), first[1].max(initial=0))) + 1
    dissolved = np.flatnonzero(own) * width + first[1][own]
    keys = np.concatenate([owner // k * width + node_id, dissolved])
    nodes, node = np.unique(keys, return_inverse=True)
    node_label = np.full(len(nodes), k)
    node_label[node[len(owner) :]] = TAIL
    label, node_label = _components(label, node_label, owner, node[: len(owner)])

    mass = np.zeros((count, k + 1))  # the last column is label TAIL's
    np.add.at(
        mass, (np.arange(count * k) // k, label), np.exp(log_probs.astype(np.float64)).ravel()
    )
    kept = node_label != TAIL
    padded_ids, groups = _padded(nodes[kept] // width, nodes[kept] % width, node_label[kept], count)
    left = tail + mass[:, k] - np.exp(span_log_prob)
    return AlignedArrays(
        padded_ids, groups, mass[:, :k], np.maximum(left, LEAST_MASS), span_log_prob
    )


def _components(
    label: np.ndarray, node_label: np.ndarray, owner: np.ndarray, node: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Lower the labels of entries and nodes until those joined by an edge (owner, node) agree."""
    while True:
        before = label.copy()
        np.minimum.at(node_label, node, label[owner])
        np.minimum.at(label, owner, node_label[node])
        if np.array_equal(before, label):
            return label, node_label


def _padded(
    rows: np.ndarray, ids: np.ndarray, groups: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sorted members (E,) of `count` rows as two arrays (count, C), filled up with -1 and 0."""
    sizes = np.bincount(rows, minlength=count)
    within = np.arange(len(rows)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    shape = (count, max(1, int(sizes.max(initial=0))))
    all_ids, all_groups = np.full(shape, -1), np.zeros(shape, np.int64)
    all_ids[rows, within], all_groups[rows, within] = ids, groups
    return all_ids, all_groups


def _by_bytes(vocabulary: Vocabulary) -> dict[bytes, int]:
    """The token of some bytes; of several, that which the tokenizer itself gives."""
    found: dict[bytes, int] = {}
    for token, piece in enumerate(vocabulary.tokens):
        if piece and (piece not in found or vocabulary.split(piece) == [token]):
            found[piece] = token
    return found
