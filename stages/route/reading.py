"""Queries into pooled states, batch by batch, so that an interruption costs one batch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling.blocks import dissect
from modeling.pooled_states import Span, pooled_states
from runtime.prompt import prompt_tokens, request_span
from stages.route.queries import Query


@dataclass(frozen=True)
class Batch:
    """Prompts of one length: token ids, which of them are the query's, places among all."""

    prompts: list[list[int]]
    spans: list[Span]
    places: list[int]


class States:
    """The pooled states found so far, (N, blocks, D); can be saved half-way."""

    def __init__(self, count: int, blocks: Sequence[int]) -> None:
        self._shape = (count, len(blocks))
        self.batches = 0
        self.found = torch.zeros(0)

    def add(self, places: list[int], states: Tensor) -> None:
        """Take the states (B, blocks, D) of the queries at some places."""
        if not len(self.found):
            self.found = torch.zeros(*self._shape, states.shape[-1])
        self.found[places] = states.cpu()
        self.batches += 1

    def save(self, folder: Path) -> None:
        """Write states.safetensors."""
        save_file({"found": self.found, "batches": torch.tensor(self.batches)}, folder / FILE)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""
        tensors = load_file(folder / FILE)
        self.found, self.batches = tensors["found"], int(tensors["batches"])


FILE = "states.safetensors"


def require_blocks(model: PreTrainedModel, blocks: Sequence[int]) -> None:
    """Refuse blocks that the student does not have."""
    count = len(dissect(model).blocks)
    if strange := [block for block in blocks if block > count]:
        raise ValueError(
            f"'blocks' names blocks {strange}, but the student has {count}; name 1 to {count}"
        )


def batches(
    queries: Sequence[Query], tokenizer: PreTrainedTokenizerBase, most: int
) -> Iterator[Batch]:
    """Prompts of the queries, those of the same length together: no padding, no masks."""
    prompts = [prompt_tokens(query.text, tokenizer) for query in queries]
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    group: list[int] = []
    for place in order:
        if group and (len(group) == most or len(prompts[place]) != len(prompts[group[0]])):
            yield _batch(prompts, group, tokenizer)
            group = []
        group.append(place)
    if group:
        yield _batch(prompts, group, tokenizer)


def _batch(prompts: list, places: list[int], tokenizer: PreTrainedTokenizerBase) -> Batch:
    taken = [prompts[place] for place in places]
    span = request_span(taken[0], tokenizer)  # all have one length
    return Batch(taken, [span] * len(taken), places)


def read_batch(model: PreTrainedModel, batch: Batch, blocks: Sequence[int]) -> Tensor:
    """Pooled states (B, blocks, D)."""
    return pooled_states(model, batch.prompts, batch.spans, list(blocks))
