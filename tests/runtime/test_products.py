"""Packed products: what linear layers give, side by side, for any number of rows."""

import pytest
import torch
from torch.nn.functional import linear

from runtime.generation.products import LARGEST_HALF, pack, packing_for

HALF = packing_for(torch.float32, True) == "float16"
needs_fbgemm = pytest.mark.skipif(not HALF, reason="no FBGEMM in this torch, or no x86")


@pytest.mark.parametrize(
    "packing", ["plain", "onednn", pytest.param("float16", marks=needs_fbgemm)]
)
@pytest.mark.parametrize("rows", [0, 1, 5, 40])
def test_a_product_is_that_of_the_layers_side_by_side(packing: str, rows: int) -> None:
    parts = [(torch.randn(64, 32), None), (torch.randn(16, 32), torch.randn(16))]
    x = torch.randn(rows, 32)
    expected = torch.cat([linear(x, *part) for part in parts], -1)
    found = pack(parts, packing)(x)
    tolerance = 2e-2 if packing == "float16" else 1e-4
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@needs_fbgemm
def test_weights_of_float16_lose_nothing_when_they_are_packed_as_such() -> None:
    weight, x = torch.randn(64, 32).half().float(), torch.randn(5, 32)
    found = pack([(weight, None)], "float16")(x)
    torch.testing.assert_close(found, linear(x, weight), atol=1e-5, rtol=1e-5)


@needs_fbgemm
def test_a_weight_that_float16_cannot_hold_stays_as_it_is() -> None:
    weight = torch.full((8, 8), 4 * LARGEST_HALF)
    found = pack([(weight, None)], "float16")(torch.ones(1, 8))
    torch.testing.assert_close(found, linear(torch.ones(1, 8), weight))


def test_only_float32_is_packed_in_half_and_only_if_asked() -> None:
    assert packing_for(torch.float32, False) != "float16"
    assert packing_for(torch.bfloat16, True) != "float16"
