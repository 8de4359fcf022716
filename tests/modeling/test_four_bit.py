"""Weights in four bits: what is stored, what it stands for, and that the model runs from it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modeling.four_bit import (
    CONFIG,
    MOST_ROWS,
    WEIGHTS,
    FourBit,
    FourBitLinear,
    from_four_bits,
    open_four_bit,
    to_eight_bits,
    to_four_bits,
    write_four_bit,
)
from tests.tiny import tiny_llama, tiny_mamba

TOKENS = torch.arange(24).view(2, 12) * 5 % 97
FORM = FourBit(group=32)


def weight(rows: int = 32, columns: int = 128) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def test_sixteen_even_values_come_back_as_they_were() -> None:
    values = (torch.arange(64) % 16 - 8).float().repeat(4, 1) * 0.25
    codes, scales = to_four_bits(values, 32)
    assert codes.max() <= 15
    assert scales.shape == (4, 2, 2)
    assert torch.equal(from_four_bits(codes, scales, torch.float32), values)


def test_the_error_is_at_most_that_of_the_whole_range_and_less_with_outliers() -> None:
    values = weight()
    values[:, ::32] *= 6
    codes, scales = to_four_bits(values, 32)
    error = (from_four_bits(codes, scales, torch.float32) - values).square().sum()
    grouped = values.unflatten(1, (-1, 32))
    low, high = grouped.amin(2, keepdim=True), grouped.amax(2, keepdim=True)
    step = (high - low) / 15
    plain = ((grouped - low) / step).round() * step + low
    assert error < (plain - grouped).square().sum()


def test_a_constant_row_is_no_division_by_zero() -> None:
    for value in (0.0, 1.0):
        codes, scales = to_four_bits(torch.full((16, 32), value), 32)
        assert torch.equal(
            from_four_bits(codes, scales, torch.float32), torch.full((16, 32), value)
        )
    assert not to_eight_bits(torch.zeros(2, 4))[0].any()


@pytest.mark.parametrize("rows", [1, MOST_ROWS, MOST_ROWS + 1])
def test_both_ways_to_multiply_give_the_product_of_the_unpacked_weight(rows: int) -> None:
    codes, scales = to_four_bits(weight(), 32)
    layer = FourBitLinear(codes[:, ::2] | codes[:, 1::2] << 4, scales, torch.ones(32))
    assert torch.equal(layer.unpacked(torch.float32), from_four_bits(codes, scales, torch.float32))
    x = torch.randn(rows, 128, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    expected = x @ layer.unpacked(torch.float32).T + 1
    torch.testing.assert_close(layer(x), expected, rtol=0.02, atol=0.1)


@pytest.mark.parametrize("make", [tiny_llama, tiny_mamba])
def test_a_model_in_four_bits_is_the_model_with_the_weights_that_they_stand_for(
    make, tmp_path: Path
) -> None:
    model = make(width=64)
    write_four_bit(model, tmp_path, FORM)
    opened = open_four_bit(tmp_path)
    assert type(opened) is type(model)
    before = model(TOKENS).logits
    for name, layer in opened.named_modules():
        if isinstance(layer, FourBitLinear):
            model.get_submodule(name).weight.data = layer.unpacked(torch.float32)
    model.set_input_embeddings(opened.get_input_embeddings())
    model.set_output_embeddings(opened.get_output_embeddings())
    assert torch.equal(opened(TOKENS).logits, model(TOKENS).logits)
    assert not torch.equal(opened(TOKENS).logits, before)


@pytest.mark.parametrize("make", [tiny_llama, tiny_mamba])
def test_decoding_with_a_cache_follows_the_whole_forward(make, tmp_path: Path) -> None:
    write_four_bit(make(width=64), tmp_path, FORM)
    model = open_four_bit(tmp_path)
    answer = model.generate(TOKENS[:1, :6], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    whole = model(TOKENS[:1]).logits[:, -1]
    cached = model(TOKENS[:1, :-1], use_cache=True)
    kind = "cache_params" if make is tiny_mamba else "past_key_values"
    step = model(TOKENS[:1, -1:], use_cache=True, **{kind: getattr(cached, kind)}).logits[:, -1]
    assert answer.shape == (1, 10)
    assert torch.corrcoef(torch.cat([whole, step]))[0, 1] > 0.99


def test_blocks_take_four_and_a_bit_bits_and_what_is_no_linear_layer_stays_whole(
    tmp_path: Path,
) -> None:
    model = tiny_mamba(width=64)
    write_four_bit(model, tmp_path, FORM)
    stored = load_file(tmp_path / WEIGHTS)
    layers = json.loads((tmp_path / CONFIG).read_text(encoding="utf-8"))["linear"]
    assert {name.rpartition(".")[2] for name in layers} == {"in_proj", "out_proj"}
    name, part = layers[0], model.get_submodule(layers[0]).weight
    size = stored[f"{name}.bytes"].nbytes + stored[f"{name}.scales"].nbytes
    assert size * 8 / part.numel() == 5  # 4.5 with groups of 64
    assert torch.equal(
        stored["backbone.layers.0.mixer.dt_proj.weight"],
        model.backbone.layers[0].mixer.dt_proj.weight,
    )
    assert not any(key.startswith("lm_head") for key in stored)  # tied


def test_a_head_of_its_own_is_kept(tmp_path: Path) -> None:
    model = tiny_llama(width=64)
    assert not model.config.tie_word_embeddings
    write_four_bit(model, tmp_path, FORM)
    opened = open_four_bit(tmp_path)
    error = (opened.lm_head.weight - model.lm_head.weight).abs().max()
    assert error < 0.02 * model.lm_head.weight.abs().max()


def test_what_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"in four bits \(four_bit.json is missing\)"):
        open_four_bit(tmp_path)
    with pytest.raises(ValueError, match="'group' is 48; torch multiplies groups of"):
        FourBit(48)
    write_four_bit(tiny_llama(width=64), tmp_path, FORM)
    (tmp_path / "config.json").write_text(
        (tmp_path / "config.json")
        .read_text()
        .replace('"num_hidden_layers": 3', '"num_hidden_layers": 4')
    )
    with pytest.raises(
        ValueError, match=r"does not fit its config.json: missing \['model.layers.3"
    ):
        open_four_bit(tmp_path)
