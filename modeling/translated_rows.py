"""A student's rows in a teacher's tokens, and the teacher's answers on them in the student's.

A teacher's row begins with what its tokenizer opens a text with (the end of a text, where it opens
it with nothing, as rows separate documents by it), so that its first token has a distribution too.
Of a row that begins inside a character, the bytes of that are left out, and the positions before
its end have no answer.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from modeling.token_bytes import Vocabulary, cut_at_start, encode_bytes
from modeling.translation import Before, Observed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Place:
    """Which of the teacher's positions speaks at a position of the student, and what is before."""

    at: int  # of the teacher's tokens, the opening counted
    before: Before
    follows: int  # the teacher's token that follows there; -1 at a row's end


@dataclass(frozen=True)
class TranslatedRow:
    """The teacher's tokens (U,) of a row, and the place of each of the student's T positions.

    None for a position before the teacher's first boundary.
    """

    tokens: np.ndarray
    places: list[Place | None]


def opening_of(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The tokens before a text: the tokenizer's own, else the end of the text before."""
    return tokenizer("")["input_ids"][:1] or [tokenizer.eos_token_id]


def translate_row(
    row: np.ndarray, student: Vocabulary, tokenizer: "PreTrainedTokenizerBase", teacher: Vocabulary
) -> TranslatedRow:
    """A student's row (T,) in the teacher's tokens. Raises ValueError as `encode_bytes`."""
    text, ends = student.join(row), student.ends(row)
    ids, teacher_ends = encode_bytes(tokenizer, teacher, text)
    opening = opening_of(tokenizer)
    tokens = np.array([*opening, *ids], dtype=np.int64)
    late = cut_at_start(text)
    boundaries = np.array([*[late] * len(opening), *teacher_ends], dtype=np.float64)
    starts = np.ceil(boundaries).astype(np.int64)
    lead = boundaries < starts  # INSIDE: the tokenizer put a space behind it that the row has not
    lead[: len(opening)] = len(ids) > 0 and teacher_ends[0] - len(teacher.tokens[ids[0]]) < late
    places: list[Place | None] = []
    known = {0, *ends.tolist()}
    at = np.searchsorted(starts, ends, side="right") - 1
    for token, end, j in zip(row.tolist(), ends.tolist(), at.tolist(), strict=True):
        if j < 0:
            places.append(None)
            continue
        begun = (b" " if lead[j] else b"") + text[starts[j] : end]
        follows = int(tokens[j + 1]) if j + 1 < len(tokens) else -1
        whole = starts[j] in known and not lead[j]
        places.append(Place(j, Before(token, begun, whole), follows))
    return TranslatedRow(tokens, places)


def observe(rows: Sequence[np.ndarray], translated: Sequence[TranslatedRow]) -> Observed:
    """Count on rows what followed what."""
    firsts: dict[tuple[int, int], Counter[int]] = defaultdict(Counter)
    neighbours: dict[int, set[int]] = defaultdict(set)
    for row, other in zip(rows, translated, strict=True):
        pairs = itertools.pairwise(row.tolist())
        for place, (last, label) in zip(other.places[:-1], pairs, strict=True):
            neighbours[last].add(label)
            if place and place.follows >= 0:
                firsts[place.follows, len(place.before.begun)][label] += 1
    return Observed(dict(firsts), dict(neighbours))
