"""Conversations as tokens: which of them a loss counts, and how they lie in a batch.

Counted are the model's own tokens and the end of its answer; not what the user says, what a tool
answers, or a number that could only be recited.

A batch is laid out in one of three ways, which give the same loss and gradients:

    padded   a row each, of about equal lengths together. Padding stands behind a row, where causal
             attention does not look: no mask, so that the kernels without one serve
    packed   as many as fit into a row (best fit, the longest first), positions starting anew, from
             which transformers makes a mask of blocks. For kernels that are fast on long rows;
             not for models with a recurrent state, which would run on from one into the next
    shared   all in one row without padding, what they begin with once (modeling/forests.py): least
             is computed. For models that modeling/shared_prefixes.py finds fit for it

Letters: R rows, T tokens a row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from modeling.forests import Forest, plant
from runtime.prompt import inserted_tokens, prompt_tokens
from stages.formats.conversations import Conversation

Sized = TypeVar("Sized")  # whatever has a length in tokens


@dataclass(frozen=True)
class Example:
    """A conversation as tokens, and which of them are counted."""

    tokens: tuple[int, ...]
    counted: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Rows:
    """Examples that are computed together."""

    tokens: Tensor  # (R, T) int64
    positions: Tensor  # (R, T) int64; from 0 in each example
    counted: Tensor  # (R, T) bool

    @property
    def real(self) -> Tensor:
        """Which tokens are not padding, (R, T): those up to the last counted one, an end."""
        return self.counted.flip(1).cumsum(1).flip(1) > 0


@dataclass(frozen=True)
class SharedRows:
    """Examples that are computed together, what they begin with once."""

    forest: Forest
    before: Tensor  # (M,) int64: places of the tokens in front of counted ones, by example
    labels: Tensor  # (M,) int64: the counted tokens


def encode(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> Example:
    """The tokens of a conversation, EOS behind the last."""
    tokens = prompt_tokens(conversation.prompt, tokenizer)
    counted = [False] * len(tokens)
    for kind, pieces in _stretches(conversation):
        if kind == "result":
            inserted = inserted_tokens(pieces[0][1], tokenizer)
            tokens += inserted
            counted += [False] * len(inserted)
        else:
            own, counts = _own_tokens(pieces, tokenizer)
            tokens += own
            counted += counts
    return Example((*tokens, tokenizer.eos_token_id), (*counted, True))


def _stretches(conversation: Conversation) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Results one by one; own and recited text that touch, together."""
    pieces: list[tuple[str, str]] = []
    for segment in conversation.segments[1:]:
        if segment[0] == "result":
            yield "own", pieces
            yield "result", [segment]
            pieces = []
        else:
            pieces.append(segment)
    yield "own", pieces


def _own_tokens(
    pieces: list[tuple[str, str]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[bool]]:
    """Tokens of own text, and which count: those without a character of a recited piece."""
    recited = [kind == "recited" for kind, text in pieces for _ in text]
    text = "".join(text for _, text in pieces)
    if not any(recited):
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokens, [True] * len(tokens)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    counts = [not any(recited[start:end]) for start, end in encoded["offset_mapping"]]
    return encoded["input_ids"], counts


def lay_out(examples: Sequence[Example], pad: int, most_tokens: int, packs: bool) -> Iterator[Rows]:
    """Examples in rows, at most `most_tokens` computed at a time where one alone is not longer."""
    if packs:
        for row in pack(sorted(examples, key=len, reverse=True), most_tokens):
            yield make_rows([row], pad)
    else:
        for group in alike(examples, most_tokens):
            yield make_rows([[example] for example in group], pad)


def share(examples: Sequence[Example]) -> SharedRows:
    """Tensors of examples that share what they begin with."""
    forest = plant([example.tokens for example in examples])
    before, labels = [], []
    for example, places in zip(examples, forest.rows, strict=True):
        counted = torch.tensor(example.counted)[1:]
        before.append(places[:-1][counted])
        labels.append(torch.tensor(example.tokens)[1:][counted])
    return SharedRows(forest, torch.cat(before), torch.cat(labels))


def side_by_side(examples: Sequence[Example], most_tokens: int) -> list[list[int]]:
    """Indices of examples, those that begin alike together: about `most_tokens` when shared."""
    order = sorted(range(len(examples)), key=lambda index: examples[index].tokens)
    groups: list[list[int]] = []
    room = 0
    for index in order:
        tokens = examples[index].tokens
        begins = _common(examples[groups[-1][-1]].tokens, tokens) if groups else 0
        if groups and len(tokens) - begins <= room:
            groups[-1].append(index)
            room -= len(tokens) - begins
        else:
            groups.append([index])
            room = most_tokens - len(tokens)
    return groups


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two rows begin with alike."""
    differ = (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differ, min(len(one), len(other)))


def alike(examples: Sequence[Sized], most_tokens: int) -> list[list[Sized]]:
    """Examples of about equal lengths together, the longest first, `most_tokens` with padding."""
    groups: list[list[Sized]] = []
    for example in sorted(examples, key=len, reverse=True):
        if groups and (len(groups[-1]) + 1) * len(groups[-1][0]) <= most_tokens:
            groups[-1].append(example)
        else:
            groups.append([example])
    return groups


def pack(longest_first: Sequence[Example], row_tokens: int) -> list[list[Example]]:
    """Best-fit decreasing: each example into the fullest row that it still fits into."""
    rows: list[list[Example]] = []
    room: list[int] = []
    for example in longest_first:
        fits = [index for index, left in enumerate(room) if left >= len(example)]
        if fits:
            best = min(fits, key=room.__getitem__)
        else:
            best = len(rows)
            rows.append([])
            room.append(row_tokens)
        rows[best].append(example)
        room[best] -= len(example)
    return rows


def make_rows(rows: list[list[Example]], pad: int) -> Rows:
    """Tensors of rows of examples; padding follows the last one, on its positions."""
    width = max(sum(map(len, row)) for row in rows)
    tokens = torch.full((len(rows), width), pad)
    positions = torch.zeros(len(rows), width, dtype=torch.int64)
    counted = torch.zeros(len(rows), width, dtype=torch.bool)
    for index, row in enumerate(rows):
        end = 0
        for example in row:
            start, end = end, end + len(example)
            tokens[index, start:end] = torch.tensor(example.tokens)
            counted[index, start:end] = torch.tensor(example.counted)
            positions[index, start:] = torch.arange(width - start)
    return Rows(tokens, positions, counted)
