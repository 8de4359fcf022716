"""Streaming: block by block from disk a data set gets what the model's own forward gives it."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from modeling.blocks import find_units
from modeling.checkpoint import read_checkpoint
from modeling.reading import PAGE
from modeling.skeleton import OUTSIDE
from modeling.streaming import Passage, linear_head
from tests.coverage import whole_forward
from tests.modeling.passages import (
    Shapes,
    assert_same,
    batches_of,
    exhaust,
    finish,
    saved,
    streaming,
)

FAMILIES = ["llama", "gpt2", "mamba", "mixtral", "gemma2", "gemma3"]
SHARING = ["gemma4_text", "deepseek_v4", "zaya", "hrm_text", "gpt_neo", "hy_v4"]

every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


# --- the same numbers ------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*FAMILIES, *SHARING])
@pytest.mark.parametrize(
    "shapes", [[(2, 12), (1, 7)], [(1, 1)], [(3, 8), (3, 8), (1, 30)]], ids=str
)
def test_every_state_and_logit_is_that_of_a_whole_forward(
    family: str, shapes: Shapes, tmp_path: Path
) -> None:
    model = saved(family, tmp_path)
    batches = batches_of(model, shapes)
    states, logits = whole_forward(model, batches)
    with streaming(model, tmp_path, batches) as passage:
        found = {(a.block, a.batch): a.hidden.clone() for a in passage.run() if a.block >= 0}
        assert set(found) == set(states)
        assert all(torch.equal(found[place], states[place]) for place in states)
        assert_same(finish(passage), logits)


@every_family
def test_a_block_is_over_for_all_batches_before_the_next_begins(
    family: str, tmp_path: Path
) -> None:
    model = saved(family, tmp_path)
    with streaming(model, tmp_path, batches_of(model, [(1, 5)] * 3)) as passage:
        told = exhaust(passage)
    assert told == [(block, batch) for block in range(-1, 4) for batch in range(3)]


@every_family
def test_weights_are_read_once_whatever_the_number_of_batches(family: str, tmp_path: Path) -> None:
    model = saved(family, tmp_path)
    read = []
    for count in (1, 6):
        with streaming(model, tmp_path, batches_of(model, [(1, 5)] * count)) as passage:
            exhaust(passage)
            pieces = list(passage.weights.head())
            reader, skeleton = passage.weights.reader, passage.weights.skeleton
        read.append(reader.bytes_read)
        assert len(pieces) == 1
    assert read[0] == read[1]
    places = read_checkpoint(tmp_path).tensors
    names = [name for part, some in skeleton.parts.items() if part != OUTSIDE for name in some]
    size = sum(places[name].size for name in names) + linear_head(skeleton.model).weight.nbytes
    assert size <= read[0] <= size + 2 * PAGE * (len(skeleton.blocks) + 1)


# --- going on --------------------------------------------------------------------------------


def stopped_everywhere(passage: Passage) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
    for arrival in passage.run():
        snapshot = {name: tensor.clone() for name, tensor in passage.snapshot().items()}
        yield arrival.block, arrival.batch, snapshot


@pytest.mark.parametrize("family", [*FAMILIES, *SHARING])
def test_a_snapshot_at_every_block_and_batch_restores_to_the_same_bits(
    family: str, tmp_path: Path
) -> None:
    model = saved(family, tmp_path)
    batches = batches_of(model, [(2, 9), (1, 4)])
    with streaming(model, tmp_path, batches) as passage:
        stops = list(stopped_everywhere(passage))
        expected = finish(passage)
    empty = [(block, batch) for block, batch, snapshot in stops if not snapshot]
    if family in FAMILIES:
        assert empty == [(-1, 0)]  # the second batch had not begun
    else:
        assert stops[-1][:2] in empty, "a hidden state alone does not tell where it is"
    for number, (_, _, snapshot) in enumerate(stops, start=1):
        if snapshot:
            save_file(snapshot, tmp_path / "snapshot")
            with streaming(model, tmp_path, batches) as passage:
                passage.restore(load_file(tmp_path / "snapshot"))
                told = [place for place in exhaust(passage) if place[0] >= 0]
                assert_same(finish(passage), expected)
            if family in FAMILIES:  # nothing is done again
                assert told == [(block, batch) for block, batch, _ in stops[number:] if block >= 0]


# --- branches --------------------------------------------------------------------------------


def without_block(model: PreTrainedModel, index: int) -> PreTrainedModel:
    """The same model, one block of which hands on what it was given."""

    def hand_on(_module: Any, args: tuple, kwargs: dict, output: Any) -> Any:
        given = (args[0] if args else kwargs["hidden_states"], *args[1:])
        if isinstance(output, Tensor):
            return given[0]
        return (*given, *[None] * len(output))[: len(output)]

    changed = copy.deepcopy(model)
    find_units(changed)[index].register_forward_hook(hand_on, with_kwargs=True)
    return changed


@pytest.mark.parametrize("family", [*FAMILIES, "zaya", "gemma3", "phi"])
def test_a_branch_from_a_blocks_input_equals_a_model_without_the_block(
    family: str, tmp_path: Path
) -> None:
    model = saved(family, tmp_path)
    batches = batches_of(model, [(1, 6), (2, 9)])
    before: dict[int, Tensor] = {}
    made: list[tuple[int, int]] = []
    with streaming(model, tmp_path, batches) as passage:
        for arrival in passage.run():
            if arrival.batch >= 2:
                continue
            if arrival.block >= 0 and arrival.batch in before:
                passage.branch(arrival.batch, arrival.block, before[arrival.batch])
                made.append((arrival.batch, arrival.block))
            before[arrival.batch] = arrival.hidden.clone()
        found = finish(passage)
    assert len(made) >= 6
    expected = [model(**batch).logits for batch in batches]
    expected += [without_block(model, block)(**batches[batch]).logits for batch, block in made]
    assert_same(found, expected)
    assert not torch.allclose(found[0], found[2])


@pytest.mark.parametrize("family", [*FAMILIES, "hrm_text", "gemma4_text", "deepseek_v4", "gpt_neo"])
def test_a_branch_that_changes_nothing_ends_as_its_batch_does(family: str, tmp_path: Path) -> None:
    """However often a model comes to a block, and whatever its blocks leave for each other."""
    model = saved(family, tmp_path)
    with streaming(model, tmp_path, batches_of(model, [(1, 6), (2, 5)])) as passage:
        origins = [0, 1]
        for arrival in passage.run():
            if arrival.batch == 1 and arrival.block >= 0 and len(origins) < 12:
                for batch in (1, 0):  # the other one is before the next block by now
                    passage.branch(batch, arrival.block, passage.forwards[batch].hidden.clone())
                    origins.append(batch)
        found = finish(passage)
    assert_same(found, [found[origin] for origin in origins])


def test_a_branch_at_a_block_that_its_batch_is_not_behind_is_refused(tmp_path: Path) -> None:
    model = saved("llama", tmp_path)
    with streaming(model, tmp_path, batches_of(model, [(1, 6)])) as passage:
        for arrival in passage.run():
            for block in {-2, -1, 0, 1, 2, 3} - {arrival.block}:
                with pytest.raises(ValueError, match=f"is behind block {arrival.block}, not"):
                    passage.branch(0, block, arrival.hidden)
