"""Tiny saved models, and batches on their way through them while they stay on disk."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import PreTrainedModel

from modeling.checkpoint import read_checkpoint
from modeling.skeleton import build_skeleton
from modeling.streaming import Passage, linear_head
from modeling.weights import Streamed
from tests.causal_lms import tiny_inputs, tiny_model

Batches = list[Mapping[str, Any]]
Shapes = list[tuple[int, int]]


def batches_of(model: PreTrainedModel, shapes: Shapes) -> Batches:
    return [tiny_inputs(model, *shape, seed=n) for n, shape in enumerate(shapes)]


def saved(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A tiny model, saved and opened again as transformers does it."""
    kind = tiny_model(family).to(dtype)
    kind.save_pretrained(folder)
    return type(kind).from_pretrained(folder, local_files_only=True, dtype=dtype).eval()


@contextlib.contextmanager
def streaming(
    model: PreTrainedModel, folder: Path, batches: Batches, tokens: float = math.inf
) -> Iterator[Passage]:
    """Batches on their way through a saved model that stays on disk."""
    checkpoint = read_checkpoint(folder)
    skeleton = build_skeleton(type(model), model.config, checkpoint, model.dtype)
    with contextlib.closing(Streamed(skeleton, checkpoint, tokens)) as weights:
        yield Passage(skeleton.model, skeleton.blocks, weights, batches)


def finish(passage: Passage) -> list[Tensor]:
    """The logits of each forward that is at the head."""
    weight, bias = passage.weights.whole_head(), linear_head(passage.model).bias
    return [f.finish(linear(f.normed, weight, bias)).logits for f in passage.forwards]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def exhaust(passage: Passage) -> list[tuple[int, int]]:
    return [(arrival.block, arrival.batch) for arrival in passage.run()]
