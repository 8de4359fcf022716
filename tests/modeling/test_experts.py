"""Experts that are read only when they are routed to: the same bits, from those bytes alone."""

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import core_model_loading as loading

import modeling.experts
import modeling.reading
from modeling.checkpoint import Place, read_checkpoint
from modeling.experts import Experts, _keeps_apart, find_routed
from modeling.reading import PAGE
from modeling.skeleton import OUTSIDE, build_skeleton
from modeling.streaming import NotFinite, linear_head
from modeling.teacher import open_teacher
from tests.coverage import whole_forward
from tests.modeling import test_streaming as usual
from tests.modeling.passages import assert_same, batches_of, exhaust, finish, saved, streaming
from tests.modeling.test_streaming_ends import damage

# one tensor an expert, or one for all, converted or not; gemma4's lie at odd addresses in the file
FAMILIES = ["mixtral", "qwen3_moe", "deepseek_v3", "olmoe", "gpt_oss", "granitemoe", "gemma4"]
WHOLE = ["dbrx", "jetmoe", "llama4_text", "longcat_flash", "llama"]


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many tokens there are, experts are read as they are routed to."""
    monkeypatch.setattr(modeling.experts, "ROUTED_BELOW", 2)


# --- the same numbers ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shapes", [[(2, 12), (1, 7)], [(1, 1), (1, 2)]], ids=str)
def test_every_state_and_logit_is_that_of_a_whole_forward(
    family: str, shapes: list, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = saved(family, tmp_path, dtype)
    batches = batches_of(model, shapes)
    states, logits = whole_forward(model, batches)  # a copy lies elsewhere, and rounds otherwise
    with streaming(model, tmp_path, batches, tokens=1) as passage:
        assert passage.weights.routed
        found = {(a.block, a.batch): a.hidden.clone() for a in passage.run() if a.block >= 0}
        assert set(found) == set(states)
        assert all(torch.equal(found[place], states[place]) for place in states)
        assert_same(finish(passage), logits)


@pytest.mark.parametrize("family", ["mixtral", "zaya", "deepseek_v4", "hy_v4"])
def test_a_snapshot_restores_to_the_same_bits(family: str, tmp_path: Path, always: None) -> None:
    usual.test_a_snapshot_at_every_block_and_batch_restores_to_the_same_bits(family, tmp_path)


@pytest.mark.parametrize("family", ["mixtral", "zaya", "qwen3_moe", "gpt_oss"])
def test_a_branch_equals_a_model_without_the_block(
    family: str, tmp_path: Path, always: None
) -> None:
    usual.test_a_branch_from_a_blocks_input_equals_a_model_without_the_block(family, tmp_path)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v4"])
def test_a_branch_that_changes_nothing_ends_as_its_batch_does(
    family: str, tmp_path: Path, always: None
) -> None:
    usual.test_a_branch_that_changes_nothing_ends_as_its_batch_does(family, tmp_path)


def test_choices_that_are_no_ids_of_experts_bring_all_experts(tmp_path: Path, always: None) -> None:
    """As a router marks a token that none of its experts is for."""

    def mark(_module: Any, _args: Any, output: tuple) -> tuple:
        *others, ids = output
        return (*others, ids.clone().index_fill_(0, torch.tensor([0]), 4))

    def marked(model: PreTrainedModel) -> None:
        model.config._experts_implementation = "eager"  # which knows such marks
        for layer in model.model.layers:
            layer.mlp.gate.register_forward_hook(mark)

    model = saved("mixtral", tmp_path)
    batches = batches_of(model, [(1, 2), (1, 3)])
    with streaming(model, tmp_path, batches) as passage:
        marked(passage.model)
        exhaust(passage)
        found = finish(passage)
    unmarked = [model(**batch).logits for batch in batches]
    marked(model)
    assert_same(found, [model(**batch).logits for batch in batches])
    assert not torch.equal(found[0], unmarked[0])


# --- which bytes are read --------------------------------------------------------------------


def chosen_by(model: PreTrainedModel, batches: list) -> dict[int, set[int]]:
    """Block -> the experts that its router sends tokens to."""
    chosen: dict[int, set[int]] = defaultdict(set)
    for index, layer in enumerate(model.model.layers):
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts.register_forward_pre_hook(
                lambda _, args, index=index: chosen[index].update(args[1].flatten().tolist())
            )
    for batch in batches:
        model(**batch)
    return chosen


def parts_read(name: str, place: Place, chosen: set[int]) -> list[Place]:
    """What of a block's tensor is to be read."""
    if single := re.search(r"\.experts\.(\d+)\.", name):
        return [place] if int(single[1]) in chosen else []
    if ".experts." not in name:
        return [place]
    size = place.size // place.shape[0]
    return [Place(place.file, place.offset + e * size, size, place.dtype, ()) for e in chosen]


def bytes_of(places: list[Place]) -> int:
    """Of the pages that they lie in."""
    pages = {
        (place.file, page)
        for place in places
        for page in range(place.offset // PAGE, -(-(place.offset + place.size) // PAGE))
    }
    return sum(min(PAGE, file.stat().st_size - page * PAGE) for file, page in pages)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("shapes", [[(1, 1)], [(1, 1), (1, 1)], [(2, 9)]], ids=str)
def test_what_is_read_is_what_is_no_expert_and_the_experts_that_are_routed_to(
    family: str, shapes: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modeling.reading, "GAP_BYTES", 0)
    model = saved(family, tmp_path)
    batches = batches_of(model, shapes)
    with streaming(model, tmp_path, batches, tokens=1) as passage:
        exhaust(passage)
        list(passage.weights.head())
        skeleton, found = passage.weights.skeleton, passage.weights.reader.bytes_read
    chosen, places = chosen_by(model, batches), read_checkpoint(tmp_path).tensors
    if shapes == [(1, 1)]:
        assert all(len(ids) == 2 for ids in chosen.values())  # of 4
    expected = bytes_of([places["lm_head.weight"]]) if linear_head(skeleton.model) else 0
    for block, names in skeleton.parts.items():
        if block != OUTSIDE:
            fixed = [places[name] for name in names if ".experts." not in name]
            routed = [p for n in names for p in parts_read(n, places[n], chosen.get(block, set()))]
            routed = [place for place in routed if place not in fixed]
            expected += bytes_of(fixed) + bytes_of(routed)
    assert found == expected


def test_many_tokens_have_blocks_read_whole(tmp_path: Path) -> None:
    model = saved("mixtral", tmp_path)
    skeleton = build_skeleton(type(model), model.config, read_checkpoint(tmp_path), torch.float32)
    places = read_checkpoint(tmp_path).tensors
    routed = {tokens: len(find_routed(skeleton, places, tokens)) for tokens in (1, 2, 1e9)}
    assert routed == {1: 4, 2: 0, 1e9: 0}  # 2 of 4 experts a token: half of them, then 3/4


@pytest.mark.parametrize("family", WHOLE)
def test_blocks_in_which_experts_are_not_told_apart_are_read_whole(
    family: str, tmp_path: Path, always: None
) -> None:
    model = saved(family, tmp_path)
    with streaming(model, tmp_path, []) as passage:
        assert not passage.weights.routed


def test_a_model_that_does_not_say_how_many_a_token_chooses_is_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = saved("mixtral", tmp_path)
    checkpoint = read_checkpoint(tmp_path)
    skeleton = build_skeleton(type(model), model.config, checkpoint, torch.float32)
    for says, blocks in ((modeling.experts.CHOSEN_PER_TOKEN, 4), (("unheard_of",), 0)):
        monkeypatch.setattr(modeling.experts, "CHOSEN_PER_TOKEN", says)
        assert len(find_routed(skeleton, checkpoint.tensors, 1)) == blocks


def test_a_mixture_in_which_an_experts_tensor_is_missing_is_read_whole(tmp_path: Path) -> None:
    model = saved("mixtral", tmp_path)
    checkpoint = read_checkpoint(tmp_path)
    skeleton = build_skeleton(type(model), model.config, checkpoint, torch.float32)
    lost = next(name for name in skeleton.parts[2] if ".experts.3." in name)
    skeleton.parts[2].remove(lost)
    assert set(find_routed(skeleton, checkpoint.tensors, 1)) == {0, 1, 3}


def test_a_teacher_says_that_experts_are_read_as_they_are_routed_to(tmp_path: Path) -> None:
    saved("mixtral", tmp_path)
    for tokens, blocks in ((1, 4), (18, 0)):
        teacher = open_teacher(tmp_path, "streamed", tokens, tokens)
        teacher.close()
        assert len(teacher.weights.routed) == blocks
        assert ("experts of 4 blocks as they are routed to" in teacher.plan.sentence) == (
            blocks > 0
        )


# --- parts -----------------------------------------------------------------------------------

PATTERNS = ["experts.*.w1.weight", "experts.*.w3.weight"]
CONVERSIONS = [
    ([loading.MergeModulelist(dim=0), loading.Concatenate(dim=1)], True),
    ([loading.Transpose(dim0=1, dim1=2)], True),
    ([loading.MergeModulelist(dim=1)], False),
    ([loading.MergeModulelist(dim=0), loading.Concatenate(dim=0)], False),
    ([loading.Chunk(dim=0)], False),
    ([loading.Transpose(dim0=0, dim1=1)], False),
]


@pytest.mark.parametrize(("operations", "apart"), CONVERSIONS)
def test_a_conversion_that_mixes_experts_is_seen(operations: list, apart: bool) -> None:
    converter = loading.WeightConverter(PATTERNS, "experts.gate_up_proj", operations)
    assert _keeps_apart(converter) is apart


CHOICES = [
    ([[[5, 2]], [[2, 7], [0, 5]]], [0, 2, 5, 7], [[[2, 1]], [[1, 3], [0, 2]]]),
    ([[[3, 3]]], [3], [[[0, 0]]]),
    ([[[8, 1]]], list(range(8)), [[[8, 1]]]),  # a mark beyond the last expert
    ([[[-1, 1]]], list(range(8)), [[[-1, 1]]]),
    ([[[0, 1, 0, 0, 0, 0, 0, 0]]], list(range(8)), [[[0, 1, 0, 0, 0, 0, 0, 0]]]),  # a mask
    ([[[0.5, 1.0]]], list(range(8)), [[[0.5, 1.0]]]),
]


@pytest.mark.parametrize(("chosen", "ids", "numbers"), CHOICES)
def test_choices_are_numbered_in_the_order_of_ids(chosen: list, ids: list, numbers: list) -> None:
    experts = Experts(torch.nn.Identity(), [{} for _ in range(8)], set())
    found, renumbered = experts.number([torch.tensor(some) for some in chosen])
    assert found == ids
    assert_same(renumbered, [torch.tensor(some) for some in numbers])


# --- afterwards ------------------------------------------------------------------------------


def shapes_of(model: PreTrainedModel) -> dict[str, tuple[bool, tuple[int, ...]]]:
    return {name: (p.is_meta, tuple(p.shape)) for name, p in model.named_parameters()}


@pytest.mark.parametrize("last", [(0, 0), (1, 0), (1, 1), (2, 1), None])
def test_the_model_is_empty_and_of_its_old_shape_wherever_it_was_left(
    last: tuple[int, int] | None, tmp_path: Path
) -> None:
    model = saved("qwen3_moe", tmp_path)
    batches = batches_of(model, [(1, 1), (1, 1)])
    expected: list[Tensor] = [model(**batch).logits for batch in batches]
    with streaming(model, tmp_path, batches, tokens=1) as passage:
        before = shapes_of(passage.model)
        for arrival in passage.run():
            if (arrival.block, arrival.batch) == last:
                break
        assert shapes_of(passage.model) == before
        assert all(layer.mlp.experts.num_experts == 4 for layer in passage.model.model.layers)
        assert not any(
            "forward" in vars(module) for block in passage.blocks for module in block.modules()
        )
        again = type(passage)(passage.model, passage.blocks, passage.weights, batches)
        exhaust(again)
        assert_same(finish(again), expected)


def test_an_expert_that_is_not_finite_is_blamed_where_it_is_routed_to(tmp_path: Path) -> None:
    model = saved("mixtral", tmp_path)
    batches = batches_of(model, [(1, 1)])
    used = chosen_by(model, batches)[1]
    for expert in sorted(set(range(4)) - used) + sorted(used):
        name = f"model.layers.1.block_sparse_moe.experts.{expert}.w2.weight"
        damage(tmp_path, name, float("nan"))
        with streaming(model, tmp_path, batches, tokens=1) as passage:
            if expert not in used:
                exhaust(passage)
                continue
            message = "block 1 of Mixtral.* its mlp.experts.down_proj hold NaN"
            with pytest.raises(NotFinite, match=message):
                exhaust(passage)
