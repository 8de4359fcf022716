"""Blocks: found, replayed and dropped in real models of three families, equal to the bit."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from modeling.blocks import capture_calls, dissect, drop_blocks, find_blocks, find_units, run_block
from tests.causal_lms import tiny_model
from tests.tiny import tiny_gpt2, tiny_llama, tiny_mamba

FAMILIES = [tiny_llama, tiny_gpt2, tiny_mamba]
TOKENS = torch.arange(2 * 12).view(2, 12).mul(31).remainder(97)

every_family = pytest.mark.parametrize("build", FAMILIES)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def replayed(model, tokens: Tensor, kept: list[int] | None = None) -> Tensor:
    """The state behind the last block, by way of every block (or those kept) alone."""
    blocks, calls = dissect(model).blocks, capture_calls(model, tokens)
    hidden = calls.hidden
    for index in range(len(blocks)) if kept is None else kept:
        hidden = run_block(blocks[index], calls, index, hidden)
    return hidden


def state_behind_blocks(model, tokens: Tensor) -> Tensor:
    """The same state in the model's own forward: what its last norm is given."""
    seen = []
    handle = dissect(model).norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(tokens)
    handle.remove()
    return seen[0]


# --- found -----------------------------------------------------------------------------------

TOWERS = [  # all with a vision tower of as many blocks as the text has
    ("gemma3", "model.language_model.layers"),
    ("got_ocr2", "model.language_model.layers"),
    ("git", "git.encoder.layer"),  # here the tower is inside the decoder
    ("phi4_multimodal", "model.layers"),
]


@pytest.mark.parametrize(("family", "name"), TOWERS)
def test_the_texts_blocks_are_taken_where_a_vision_tower_is_as_deep(family: str, name: str) -> None:
    model = tiny_model(family)
    blocks = model.get_submodule(name)
    towers = [m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and n != name]
    assert any(len(tower) == len(blocks) for tower in towers)
    assert find_blocks(model) == (name, blocks)
    assert find_units(model) == list(blocks)


# --- capture and replay ----------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_by_block_equals_the_models_own_forward_to_the_bit(
    build: Callable, dtype: torch.dtype
) -> None:
    model = build().to(dtype)
    assert torch.equal(replayed(model, TOKENS), state_behind_blocks(model, TOKENS))


@every_family
def test_norm_and_head_turn_the_last_state_into_the_models_logits(build: Callable) -> None:
    model = build()
    anatomy = dissect(model)
    found = anatomy.head(anatomy.norm(replayed(model, TOKENS)))
    assert torch.equal(found, model(TOKENS).logits)


@every_family
def test_each_block_gets_what_the_model_would_give_it(build: Callable) -> None:
    model = build()
    seen = []
    for block in dissect(model).blocks:
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(TOKENS)
    calls = capture_calls(model, TOKENS)
    assert torch.equal(calls.hidden, seen[0])
    assert len(calls.arguments) == 3
    hidden = calls.hidden
    for index, block in enumerate(dissect(model).blocks):
        assert torch.equal(hidden, seen[index])
        hidden = run_block(block, calls, index, hidden)


@pytest.mark.parametrize("window", [3, None])
def test_a_sliding_window_of_some_layers_is_replayed_layer_by_layer(window: int | None) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=97, use_sliding_window=True, sliding_window=3,
        max_window_layers=2, initializer_range=0.2, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    if window is None:
        config.layer_types = ["full_attention"] * 4
    model = Qwen2ForCausalLM(config).eval()
    assert torch.equal(replayed(model, TOKENS), state_behind_blocks(model, TOKENS))


@every_family
def test_capturing_leaves_the_model_as_it_was(build: Callable) -> None:
    model = build()
    before = model(TOKENS).logits
    capture_calls(model, TOKENS)
    assert not any("forward" in vars(block) for block in dissect(model).blocks)
    assert torch.equal(model(TOKENS).logits, before)


def test_a_failure_while_capturing_leaves_the_model_as_it_was() -> None:
    model = tiny_llama()
    before = model(TOKENS).logits
    with pytest.raises(IndexError):
        capture_calls(model, torch.tensor([[97_000]]))
    assert torch.equal(model(TOKENS).logits, before)


def test_one_capture_serves_any_state_of_the_same_shape() -> None:
    model = tiny_llama()
    calls = capture_calls(model, TOKENS)
    first, other = (
        run_block(dissect(model).blocks[1], calls, 1, hidden)
        for hidden in (calls.hidden, calls.hidden + 1)
    )
    assert first.shape == other.shape and not torch.allclose(first, other)


# --- dissecting ------------------------------------------------------------------------------


@every_family
def test_the_parts_are_the_models_own(build: Callable) -> None:
    model = build()
    anatomy = dissect(model)
    assert len(anatomy.blocks) == 3
    assert anatomy.head is model.get_output_embeddings()
    assert "norm" in type(anatomy.norm).__name__.lower()
    assert not any(anatomy.norm is module for module in anatomy.blocks.modules())


def test_two_lists_that_could_be_the_blocks_are_refused_by_name() -> None:
    model = tiny_llama()
    model.model.experts = nn.ModuleList(nn.Identity() for _ in range(3))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has 2 lists of 3.*layers.*experts"):
        dissect(model)


def test_a_model_without_a_list_of_blocks_is_refused() -> None:
    model = tiny_llama()
    model.config.num_hidden_layers = 5
    with pytest.raises(ValueError, match=r"0 lists of 5 modules \(none\)"):
        dissect(model)


def test_a_list_outside_the_text_decoder_is_no_trouble() -> None:
    model = tiny_llama()
    model.experts = nn.ModuleList(nn.Identity() for _ in range(3))
    assert dissect(model).blocks is model.model.layers


def test_a_list_of_another_length_is_no_trouble() -> None:
    model = tiny_llama()
    model.experts = nn.ModuleList(nn.Identity() for _ in range(2))
    assert dissect(model).blocks is model.model.layers


# --- dropping --------------------------------------------------------------------------------

DROPS = [[0], [1], [2], [0, 2], []]


@every_family
@pytest.mark.parametrize("dropped", DROPS)
def test_a_model_with_dropped_blocks_runs_the_others_in_order(
    build: Callable, dropped: list[int]
) -> None:
    model = build()
    smaller = copy.deepcopy(model)
    drop_blocks(smaller, dropped)
    kept = [index for index in range(3) if index not in dropped]
    assert torch.equal(state_behind_blocks(smaller, TOKENS), replayed(model, TOKENS, kept))
    assert len(dissect(smaller).blocks) == smaller.config.num_hidden_layers == len(kept)
    for position, block in enumerate(dissect(smaller).blocks):
        places = {m.layer_idx for m in block.modules() if getattr(m, "layer_idx", None) is not None}
        assert places <= {position} and places


@every_family
@pytest.mark.parametrize("dropped", [[0], [1], [0, 2]])
def test_a_model_with_dropped_blocks_generates_the_same_with_and_without_a_cache(
    build: Callable, dropped: list[int]
) -> None:
    model = build(seed=2)
    drop_blocks(model, dropped)
    start = torch.tensor([[5, 17, 80]])
    options = {
        "max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0,
        "return_dict_in_generate": True, "output_logits": True,
    }  # fmt: skip
    mask = torch.ones_like(start)
    cached = model.generate(start, attention_mask=mask, use_cache=True, **options)
    plain = model.generate(start, attention_mask=mask, use_cache=False, **options)
    assert cached.sequences.shape == (1, 15)
    assert torch.equal(cached.sequences, plain.sequences)
    for found, expected in zip(cached.logits, plain.logits, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@every_family
def test_a_model_with_dropped_blocks_survives_saving(build: Callable, tmp_path: Path) -> None:
    model = build()
    drop_blocks(model, [1])
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, local_files_only=True).eval()
    assert len(dissect(again).blocks) == 2
    saved = again.state_dict()
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())
    torch.testing.assert_close(again(TOKENS).logits, model(TOKENS).logits, atol=1e-5, rtol=1e-5)


def test_types_of_layers_are_dropped_with_their_layers() -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    config = Qwen2Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=97, use_sliding_window=True, sliding_window=3,
        layer_types=kinds, initializer_range=0.2, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    expected = replayed(model, TOKENS, kept=[1, 2])
    drop_blocks(model, [0, 3])
    assert model.config.layer_types == kinds[1:3]
    assert torch.equal(state_behind_blocks(model, TOKENS), expected)


@pytest.mark.parametrize("dropped", [[3], [-1], [0, 7]])
def test_dropping_a_block_that_is_not_there_is_refused(dropped: list[int]) -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match=r"block"):
        drop_blocks(model, dropped)
    assert len(dissect(model).blocks) == 3
