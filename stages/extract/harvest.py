"""What is kept of a teacher while batches pass through it."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from modeling.answers import Answers, read_answers
from modeling.streaming import Passage
from stages.formats.importance import Subspaces
from stages.formats.targets import narrow


@dataclass(frozen=True)
class Wanted:
    """What is to be kept; see stages/formats/targets.py."""

    top_k: int
    prefix: int
    anchors: tuple[int, ...]
    subspaces: Subspaces


@dataclass(frozen=True)
class Sheaf:
    """What one batch left at one block; the output head counts as the block behind the last."""

    block: int
    batch: int
    tensors: dict[str, Tensor]


def harvest(passage: Passage, tokens: list[Tensor], wanted: Wanted) -> Iterator[Sheaf]:
    """Take a passage through its model, keeping what is wanted; one sheaf a block and batch.

    tokens: the batches' own, (B, T) each.
    """
    for arrival in passage.run():
        kept = {}
        if arrival.block == wanted.prefix - 1:
            kept["prefix"] = arrival.hidden.to("cpu", torch.bfloat16)
        if arrival.block in wanted.anchors:
            coordinates = wanted.subspaces.whiten(arrival.block, arrival.hidden)
            kept[f"anchor.{arrival.block}"] = coordinates.to("cpu", torch.bfloat16)
        yield Sheaf(arrival.block, arrival.batch, kept)
    vocabulary = passage.model.get_input_embeddings().weight.shape[0]
    for batch, answers in enumerate(read_answers(passage, wanted.top_k)):
        tensors = as_tensors(answers, tokens[batch], vocabulary)
        yield Sheaf(len(passage.blocks), batch, tensors)


def as_tensors(answers: Answers, tokens: Tensor, vocabulary: int) -> dict[str, Tensor]:
    """Answers in the form that they are stored in; tokens (B, T)."""
    targets = answers.targets()
    shape = (*tokens.shape, -1)
    return {
        "tokens": narrow(tokens, vocabulary),
        "ids": narrow(targets.ids, vocabulary).cpu().view(shape),
        "log_probs": targets.log_probs.half().cpu().view(shape),
        "tail": targets.tail.log().half().cpu().view(tokens.shape),
    }
