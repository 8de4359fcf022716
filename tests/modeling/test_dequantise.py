"""Dequantisation: by hand, by a naive loop, and wherever pieces and blocks end."""

from functools import partial

import pytest
import torch
from torch import Tensor

from modeling import dequantise
from modeling.dequantise import four_bits, mxfp4, scaled
from tests.modeling.quantised import NF4, TABLES, Encoded
from tests.modeling.quantised import four_bits as encode_four_bits
from tests.modeling.quantised import fp8 as encode_fp8
from tests.modeling.quantised import mxfp4 as encode_mxfp4

F32, BF16 = torch.float32, torch.bfloat16
E4M3, E5M2, E8M0 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def every_byte(dtype: torch.dtype) -> Tensor:
    return torch.arange(256, dtype=torch.uint8).view(dtype).view(16, 16)


# --- by hand ---------------------------------------------------------------------------------


def test_four_bits_are_two_values_a_byte_the_high_ones_first() -> None:
    table = torch.tensor(NF4)
    found = four_bits(
        torch.tensor([[0x0F], [0x7E]], dtype=torch.uint8), torch.tensor([2.0]), table, block=64,
        shape=(2, 2), via=F32, dtype=F32,
    )  # fmt: skip
    assert torch.equal(found, 2 * torch.tensor([[-1.0, 1.0], [0.0, NF4[14]]]))


def test_scales_that_are_quantised_are_looked_up_scaled_and_moved() -> None:
    levels = torch.linspace(-1, 1, 256)
    found = four_bits(
        torch.tensor([0xFF] * 64, dtype=torch.uint8), torch.tensor([255, 0], dtype=torch.uint8),
        torch.tensor(NF4), torch.tensor([3.0]), levels, block=64, nested_block=256,
        nested_offset=5.0, shape=(128,), via=F32, dtype=F32,
    )  # fmt: skip
    assert torch.equal(found, torch.tensor([8.0, 2.0]).repeat_interleave(64))


def test_mxfp4_is_two_values_a_byte_the_low_ones_first_and_transposed() -> None:
    blocks = torch.zeros(1, 2, 1, 16, dtype=torch.uint8)
    blocks[0, 0, 0, 0], blocks[0, 1, 0, 15] = 0x72, 0xF9
    found = mxfp4(blocks, torch.tensor([[[127], [130]]], dtype=torch.uint8), dtype=BF16)
    expected = torch.zeros(1, 32, 2, dtype=BF16)
    expected[0, 0, 0], expected[0, 1, 0] = 1.0, 6.0
    expected[0, 30, 1], expected[0, 31, 1] = -0.5 * 8, -6.0 * 8
    assert torch.equal(found, expected) and found.is_contiguous()


@pytest.mark.parametrize("dtype", [E4M3, E5M2, torch.int8], ids=str)
def test_every_byte_is_the_number_that_torch_says(dtype: torch.dtype) -> None:
    """NaN and infinity too: they are found where they do harm, and blamed."""
    codes = every_byte(dtype)
    found = scaled(codes, torch.tensor(0.5), block=(16, 16), dtype=F32)
    assert torch.equal(found.nan_to_num(1e9), (codes.float() * 0.5).nan_to_num(1e9))


def test_scales_in_bytes_are_powers_of_two() -> None:
    scale = torch.tensor([[120], [130]], dtype=torch.uint8)
    found = scaled(torch.ones(2, 4).to(E4M3), scale, block=(1, 4), dtype=F32)
    assert found.tolist() == [[2.0**-7] * 4, [8.0] * 4]
    assert torch.equal(
        found, scaled(torch.ones(2, 4).to(E4M3), scale.view(E8M0), block=(1, 4), dtype=F32)
    )


def test_a_value_passes_through_the_type_of_bitsandbytes() -> None:
    args = torch.tensor([0xEE], dtype=torch.uint8), torch.tensor([1.0]), torch.tensor(NF4)
    sizes = partial(four_bits, *args, block=64, shape=(2,), dtype=F32)
    value = torch.tensor(NF4[14])
    assert sizes(via=torch.float16)[0] == value.half().float() != value
    assert sizes(via=F32)[0] == value


# --- wherever pieces and blocks end ----------------------------------------------------------

SHAPES = [(1, 1), (1, 7), (5, 1), (33, 65), (64, 96), (100, 30)]
PIECES = [1, 7, 64, 1000, 1 << 18]
pieces = pytest.mark.parametrize("piece", PIECES)


@pieces
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("block", [(1, 1), (3, 5), (16, 32), (128, 128)], ids=str)
def test_fp8_of_any_shape_is_a_scale_for_every_value(
    piece: int, shape: tuple[int, int], block: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dequantise, "PIECE_VALUES", piece)
    stored, expected = encode_fp8("w", noise(*shape), block)
    assert torch.equal(scaled(*stored.values(), block=block, dtype=F32), expected)
    assert torch.equal(scaled(*stored.values(), block=block, dtype=BF16), expected.to(BF16))


@pieces
def test_experts_in_one_tensor_have_scales_of_their_own(
    piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dequantise, "PIECE_VALUES", piece)
    one = [encode_fp8("w", matrix, (16, 20)) for matrix in noise(3, 33, 50)]
    codes, scales = (
        torch.stack(parts) for parts in zip(*(e[0].values() for e in one), strict=True)
    )
    found = scaled(codes, scales, block=(16, 20), dtype=F32)
    assert torch.equal(found, torch.stack([expected for _, expected in one]))


@pieces
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("block", [32, 64, 4096])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("form", TABLES)
def test_four_bits_of_any_shape_are_a_scale_for_every_value(
    piece: int, shape: tuple[int, int], block: int, nested: bool, form: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(dequantise, "PIECE_VALUES", piece)
    nested &= shape[0] * shape[1] > block  # one scale is its own mean
    stored, expected = encode_four_bits("w", noise(*shape), form, nested, block)
    parts = ["w", "w.absmax", "w.quant_map"]
    nesting = {}
    if nested:
        parts += ["w.nested_absmax", "w.nested_quant_map"]
        absmax = [part.abs().max() for part in noise(*shape).flatten().split(block)]
        nesting = {"nested_block": 256, "nested_offset": torch.stack(absmax).mean().item()}
    args = [stored[part] for part in parts]
    found = four_bits(*args, block=block, shape=shape, via=BF16, dtype=BF16, **nesting)
    assert torch.equal(found, expected.to(BF16))


@pieces
def test_mxfp4_is_a_scale_for_every_value(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dequantise, "PIECE_VALUES", piece)
    stored, expected = encode_mxfp4("w", noise(3, 96, 10))
    assert torch.equal(mxfp4(*stored.values(), dtype=F32), expected)


# --- the formats hold what they are for ------------------------------------------------------


@pytest.mark.parametrize(
    ("encode", "error"),
    [
        (encode_fp8, 0.03),
        (partial(encode_four_bits, form="nf4", nested=False), 0.1),
        (partial(encode_four_bits, form="nf4", nested=True), 0.1),
        (partial(encode_four_bits, form="fp4", nested=False), 0.14),
    ],
)
def test_what_comes_back_is_near_what_was_stored(encode: partial[Encoded], error: float) -> None:
    weight = noise(128, 128)
    _, expected = encode("w", weight)
    assert (expected - weight).norm() / weight.norm() < error
