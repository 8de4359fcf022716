"""Narrower models: what is cut is what zeros would have been, and what does not fit is refused."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from modeling.blocks import dissect
from modeling.width import Kept, Widths, columns, cut, parts_of, widths_of
from registry.records import Keep
from tests.tiny import _random, tiny_gpt2, tiny_llama, tiny_mamba

TOKENS = torch.arange(24).reshape(2, 12)
WIDTHS = Widths(hidden=32, heads=4, kv_heads=2, head=8, ffn=64)
EVERYTHING = Kept.everything(WIDTHS, 3)


def tiny_qwen(kind: str):
    """Qwen2 has biases on q, k and v; Qwen3 norms within each head."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, vocab_size=97, max_position_embeddings=128,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = _random(getattr(transformers, f"{kind}ForCausalLM"), config, 0)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data += 0.3  # they start at 0
    return model


MODELS: list[Callable] = [tiny_llama, lambda: tiny_qwen("Qwen2"), lambda: tiny_qwen("Qwen3")]
every_model = pytest.mark.parametrize("build", MODELS, ids=["llama", "qwen2", "qwen3"])


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(TOKENS, use_cache=False).logits


def zeroed(model: nn.Module, kept: Kept) -> nn.Module:
    """The whole model, with zeros where the outputs of heads and neurons that go are read."""
    masked = copy.deepcopy(model)
    for number, block in enumerate(dissect(masked).blocks):
        parts = parts_of(block)
        for layer, stay in (
            (parts.o_proj, columns(kept.heads[number], WIDTHS.head)),
            (parts.down_proj, kept.neurons[number]),
        ):
            gone = torch.ones(layer.in_features, dtype=torch.bool)
            gone[stay] = False
            layer.weight.data[:, gone] = 0.0
    return masked


def picks(size: int, count: int, seed: int = 0) -> list[Tensor]:
    """Others in each of three blocks."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(size, generator=generator)[:count].sort().values for _ in range(3)]


@every_model
def test_cutting_nothing_changes_nothing(build: Callable) -> None:
    model = build()
    same = cut(model, EVERYTHING)
    assert torch.equal(logits(same), logits(model))
    assert type(same) is type(model)


HALF_OF_GROUPS = [torch.tensor(heads) for heads in ([0, 2], [1, 2], [1, 3])]
CUTS = {
    "neurons": replace(EVERYTHING, neurons=picks(64, 40)),
    "heads of each group": replace(EVERYTHING, heads=HALF_OF_GROUPS),
    "key/value heads": replace(
        EVERYTHING,
        kv_heads=[torch.tensor([head]) for head in (0, 1, 1)],
        heads=[torch.tensor(heads) for heads in ([0, 1], [2, 3], [2, 3])],
    ),
    "all of these": Kept(
        torch.arange(32),
        [torch.tensor([head]) for head in (0, 3, 2)],
        [torch.tensor([head]) for head in (0, 1, 1)],
        picks(64, 7),
    ),
}


@every_model
@pytest.mark.parametrize("what", CUTS)
def test_a_cut_model_answers_as_the_whole_one_with_zeros_there(build: Callable, what: str) -> None:
    model, kept = build(), CUTS[what]
    smaller = cut(model, kept)
    torch.testing.assert_close(logits(smaller), logits(zeroed(model, kept)), atol=1e-4, rtol=1e-4)
    assert (logits(smaller) - logits(model)).abs().max() > 1e-2
    found = widths_of(smaller)
    assert (found.heads, found.kv_heads) == (len(kept.heads[0]), len(kept.kv_heads[0]))
    assert (found.head, found.ffn, found.hidden) == (8, len(kept.neurons[0]), 32)


@every_model
def test_dimensions_that_are_0_everywhere_can_be_cut_with_the_norms_rescaled(
    build: Callable,
) -> None:
    """Where a norm divides by the root mean square of fewer of them, its weight makes up for it."""
    model, hidden = build(), torch.arange(24)
    model.get_input_embeddings().weight.data[:, 24:] = 0.0
    dissect(model).head.weight.data[:, 24:] = 0.0
    for block in dissect(model).blocks:
        for layer in (parts_of(block).o_proj, parts_of(block).down_proj):
            layer.weight.data[24:] = 0.0
    smaller = cut(model, replace(EVERYTHING, hidden=hidden))
    norms = [norm for block in dissect(smaller).blocks for norm in parts_of(block).norms]
    for norm in (*norms, dissect(smaller).norm):
        norm.weight.data *= (32 / 24) ** 0.5
    torch.testing.assert_close(logits(smaller), logits(model), atol=1e-3, rtol=1e-3)
    assert smaller.config.hidden_size == 24


def test_a_cut_model_opens_with_stock_transformers_and_decodes_with_its_cache(
    tmp_path: Path,
) -> None:
    from transformers import AutoModelForCausalLM

    smaller = cut(tiny_llama(), replace(CUTS["all of these"], hidden=torch.arange(3, 31)))
    smaller.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(stock).__module__.startswith("transformers.")
    assert torch.equal(logits(stock.eval()), logits(smaller))
    fixed = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    one, other = (stock.generate(TOKENS, use_cache=use, **fixed) for use in (True, False))
    assert torch.equal(one, other)


def test_tied_embeddings_stay_tied() -> None:
    smaller = cut(tiny_qwen("Qwen3"), replace(EVERYTHING, hidden=torch.arange(28)))
    assert smaller.get_output_embeddings().weight is smaller.get_input_embeddings().weight


def test_cutting_leaves_the_model_and_the_random_numbers_alone() -> None:
    model = tiny_llama()
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    cut(model, CUTS["all of these"])
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config.intermediate_size == 64


# --- sizes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "sizes"),
    [
        (Keep(ffn=0.75), (32, 4, 2, 48)),
        (Keep(kv_heads=0.5), (32, 2, 1, 64)),
        (Keep(heads=0.5), (32, 2, 2, 64)),
        (Keep(hidden=0.875, ffn=0.5), (28, 4, 2, 32)),
        (Keep(heads=0.01, ffn=0.01), (32, 2, 2, 1)),  # something is left of everything
    ],
)
def test_shares_of_the_widths_become_sizes(keep: Keep, sizes: tuple[int, ...]) -> None:
    found = WIDTHS.kept(keep)
    assert (found.hidden, found.heads, found.kv_heads, found.ffn) == sizes
    assert found.head == 8


def test_a_width_that_no_stock_model_has_is_refused_with_those_near_it() -> None:
    with pytest.raises(ValueError, match="30 hidden.*4 heads.*keep 0.8750 or 1.0000 of 'hidden'"):
        WIDTHS.kept(Keep(hidden=0.94))


def test_a_share_that_rounds_to_everything_is_refused() -> None:
    with pytest.raises(ValueError, match="keeps all of.*lower a share"):
        WIDTHS.kept(Keep(heads=0.9))


# --- what does not fit -----------------------------------------------------------------------


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_mamba])
def test_blocks_unlike_llamas_are_refused_by_name(build: Callable) -> None:
    with pytest.raises(ValueError, match="(GPT2|Mamba)Block has 0 q_proj.*'keep: null'"):
        widths_of(build())


def test_a_norm_too_many_is_refused() -> None:
    model = tiny_llama()
    model.model.layers[1].extra = nn.RMSNorm(32)
    with pytest.raises(ValueError, match="LlamaDecoderLayer has 3 norms"):
        widths_of(model)


def test_a_parameter_that_nobody_knows_is_refused_by_name() -> None:
    model = tiny_llama()
    model.model.layers[2].self_attn.sinks = nn.Parameter(torch.zeros(4))
    with pytest.raises(ValueError, match=r"'self_attn.sinks' of \(4,\).*not known how"):
        widths_of(model)


def test_blocks_of_different_sizes_are_refused() -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj = nn.Linear(32, 60, bias=False)
    with pytest.raises(ValueError, match="up_proj of block 1 of.*is 60 x 32, not 64 x 32"):
        widths_of(model)
