"""Rows of a student beside the same bytes in a teacher's tokens: the targets of a batch.

A student's row of T tokens has T - 1 positions with a next token, and the rows' positions lie one
behind the other, as `Batch.next_token` of stages/formats/targets.py has them. The span behind a
common boundary holds the tokens that the positions from there to the next boundary predict.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from modeling.aligned_loss import LEAST, NOTHING, AlignedTargets
from modeling.alignment import AlignedArrays, Candidates, bucket_targets, find_spans


@dataclass(frozen=True)
class StudentRow:
    """tokens (T,) int64 and the byte at which each ends."""

    tokens: np.ndarray
    ends: np.ndarray


@dataclass(frozen=True)
class TeacherRow:
    """The same text in the teacher's tokens, and its stored answers behind each.

    tokens, ends (U,); ids, log_probs (U, K); tail (U,), a mass; next_log_prob (U,): of the token
    that follows, which need not be in the top-k; whatever at the last.
    """

    tokens: np.ndarray
    ends: np.ndarray
    ids: np.ndarray
    log_probs: np.ndarray
    tail: np.ndarray
    next_log_prob: np.ndarray


def align_rows(
    candidates: Candidates, students: Sequence[StudentRow], teachers: Sequence[TeacherRow]
) -> tuple[AlignedTargets, AlignedArrays]:
    """Targets of all rows' positions, and the arrays that they were made of.

    Raises ValueError where two rows are not of the same text.
    """
    places, spans_of, tops, firsts, span_log_probs = [], [], [], [], []
    offset = count = 0
    for student, teacher in zip(students, teachers, strict=True):
        spans = find_spans(student.ends, teacher.ends)
        s, t = spans.student, spans.teacher
        spans_of.append(_owners(s, len(student.tokens) - 1, count))
        places.append(s[:-1] + offset)
        tops.append((teacher.ids[t[:-1]], teacher.log_probs[t[:-1]], teacher.tail[t[:-1]]))
        firsts.append((teacher.tokens[t[:-1] + 1], student.tokens[s[:-1] + 1]))
        sums = np.concatenate([[0.0], np.cumsum(teacher.next_log_prob, dtype=np.float64)])
        several = (np.diff(s) > 1) | (np.diff(t) > 1)
        span_log_probs.append(np.where(several, sums[t[1:]] - sums[t[:-1]], -np.inf))
        offset += len(student.tokens) - 1
        count += len(s) - 1
    top, first = (tuple(map(np.concatenate, zip(*c, strict=True))) for c in (tops, firsts))
    arrays = bucket_targets(candidates, top, first, np.concatenate(span_log_probs))
    span_of = np.concatenate(spans_of)
    span_of[span_of < 0] = count
    return as_targets(arrays, np.concatenate(places), span_of), arrays


def as_targets(arrays: AlignedArrays, positions: np.ndarray, span_of: np.ndarray) -> AlignedTargets:
    """Arrays as the loss takes them; positions (N,) and span_of (M,) as in AlignedTargets."""
    span = np.exp(arrays.span_log_prob)[:, None]
    masses = np.concatenate([arrays.masses, span, arrays.tail[:, None]], 1)
    logs = np.where(masses > 0, np.log(np.maximum(masses, LEAST)), NOTHING)
    return AlignedTargets(
        torch.from_numpy(positions),
        torch.from_numpy(arrays.ids),
        torch.from_numpy(arrays.groups),
        torch.from_numpy(logs).float(),
        torch.from_numpy(span_of),
    )


def _owners(boundaries: np.ndarray, positions: int, first: int) -> np.ndarray:
    """Which span each of a row's positions is in, counted from `first`; -1 for none."""
    owners = np.full(positions, -1, np.int64)
    lengths = np.diff(boundaries)
    inside = np.repeat(np.arange(len(lengths)), lengths) + first
    owners[boundaries[0] : boundaries[0] + len(inside)] = inside
    return owners
