"""What is kept of a teacher while batches pass through it."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from modeling.answers import read_answers
from modeling.losses import SparseTargets
from modeling.refusals import refuse_unusual
from modeling.samples import Samples, read_samples
from modeling.streaming import Passage
from stages.extract.translating import Translated
from stages.formats.importance import Subspaces
from stages.formats.targets import narrow, narrow_counts


@dataclass(frozen=True)
class Sampling:
    """How many next tokens are drawn a position, and what decides which."""

    draws: int
    seed: int


@dataclass(frozen=True)
class Wanted:
    """What is to be kept; see stages/formats/targets.py."""

    top_k: int
    prefix: int
    anchors: tuple[int, ...]
    subspaces: Subspaces
    sampling: Sampling | None = None  # instead of the top k
    translated: Translated | None = None  # of a teacher with another tokenizer


@dataclass(frozen=True)
class Sheaf:
    """What one batch left at one block; the output head counts as the block behind the last."""

    block: int
    batch: int
    tensors: dict[str, Tensor]


def harvest(
    passage: Passage, tokens: list[Tensor], wanted: Wanted, first: int = 0
) -> Iterator[Sheaf]:
    """Take a passage through its model, keeping what is wanted; one sheaf a block and batch.

    tokens: the batches' own, (B, T) each.  first: the number of their first position among those of
    all data, which draws follow from.  Raises CannotFollow for a model that it does not fit.
    """
    for arrival in passage.run():
        refuse_unusual(passage, arrival)
        kept = {}
        if arrival.block == wanted.prefix - 1 >= 0:
            kept["prefix"] = arrival.hidden.to("cpu", torch.bfloat16)
        if arrival.block in wanted.anchors:
            coordinates = wanted.subspaces.whiten(arrival.block, arrival.hidden)
            kept[f"anchor.{arrival.block}"] = coordinates.to("cpu", torch.bfloat16)
        yield Sheaf(arrival.block, arrival.batch, kept)
    ends = passage.model.get_input_embeddings(), passage.model.get_output_embeddings()
    vocabulary = max(end.weight.shape[0] for end in ends)  # they may differ, either way
    for batch, tensors in enumerate(_at_head(passage, tokens, wanted, first, vocabulary)):
        yield Sheaf(len(passage.blocks), batch, tensors)


def _at_head(
    passage: Passage, tokens: list[Tensor], wanted: Wanted, first: int, vocabulary: int
) -> Iterator[dict[str, Tensor]]:
    """What is kept of each batch's next tokens."""
    if wanted.translated is not None:
        yield from wanted.translated.answers(passage, first // tokens[0].shape[1])
        return
    if wanted.sampling is None:
        for batch, answers in enumerate(read_answers(passage, wanted.top_k)):
            yield as_tensors(answers.targets(), tokens[batch], vocabulary)
        return
    found = read_samples(passage, wanted.sampling.draws, wanted.sampling.seed, first)
    for batch, samples in enumerate(found):
        yield draws_as_tensors(samples, tokens[batch], vocabulary)


def as_tensors(targets: SparseTargets, tokens: Tensor, vocabulary: int) -> dict[str, Tensor]:
    """Answers in the form that they are stored in; tokens (B, T)."""
    shape = (*tokens.shape, -1)
    return {
        "tokens": narrow(tokens, vocabulary),
        "ids": narrow(targets.ids, vocabulary).cpu().view(shape),
        "log_probs": targets.log_probs.half().cpu().view(shape),
        "tail": targets.tail.log().half().cpu().view(tokens.shape),
    }


def draws_as_tensors(samples: Samples, tokens: Tensor, vocabulary: int) -> dict[str, Tensor]:
    """Draws in the form that they are stored in; tokens (B, T)."""
    ids, counts, distinct = samples.counted()
    draws = samples.ids.shape[-1]
    return {
        "tokens": narrow(tokens, vocabulary),
        "ids": narrow(ids, vocabulary).cpu(),
        "counts": narrow_counts(counts, draws).cpu(),
        "distinct": narrow_counts(distinct, draws).cpu().view(tokens.shape),
        "log_prob": samples.mean_log_prob().half().cpu().view(tokens.shape),
    }
