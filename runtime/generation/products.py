"""Matrix products with weights that are laid out once for a few rows at a time.

A step of decoding multiplies each weight with only as many rows as there are answers, so it takes
as long as reading the weights does, in the order and the type that they are stored in:

    float16    a float32 weight is rounded to float16 (11 bits, three more than bfloat16), and all
               arithmetic stays in float32: FBGEMM's packed product, on x86. Half the bytes.
    onednn     the weight in its own type, in the order that oneDNN's kernel reads; the bits of
               rows do not depend on other rows. bfloat16 on processors that multiply it.
    plain      the weight as it is, without a copy

Measured (AVX2, float32, one thread, SmolLM2's matrices): float16 takes 0.3 to 0.5 of the time of
the plain product for up to 8 rows, 0.5 to 0.7 for 16, 0.8 for 64; onednn 0.8, 0.6 to 0.9, 0.8.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

Product = Callable[[Tensor], Tensor]  # (N, D) -> (N, F)
Part = tuple[Tensor, Tensor | None]  # a weight (F, D) and a bias (F,)

LARGEST_HALF = 65_504.0  # float16's largest number
ROWS = 16  # which oneDNN lays weights out for; other numbers work, too


def packing_for(dtype: torch.dtype, half_weights: bool) -> str:
    """Which way of those above this machine packs weights of a type."""
    if dtype == torch.float32 and half_weights and _has_fbgemm():
        return "float16"
    onednn = torch.backends.mkldnn.is_available()
    if dtype == torch.float32 and onednn:
        return "onednn"
    if dtype == torch.bfloat16 and onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "onednn"
    return "plain"


def pack(parts: list[Part], packing: str) -> Product:
    """A product whose result is those of some linear layers with the same input, side by side."""
    if packing == "plain":
        return lambda x: torch.cat([linear(x, *part) for part in parts], -1)
    weights = [weight.detach() for weight, _ in parts]
    bias = _joined_bias(parts)
    if packing == "float16" and all(_fits_half(weight) for weight in weights):
        weight = torch.cat(weights) if len(weights) > 1 else weights[0]  # the head is large
        packed = torch.ops.quantized.linear_prepack_fp16(weight, bias)
        return lambda x: torch.ops.quantized.linear_dynamic_fp16(x, packed)
    weight = torch.cat(weights)  # a copy always: what is in order already would be shared
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def _joined_bias(parts: list[Part]) -> Tensor | None:
    if all(bias is None for _, bias in parts):
        return None
    zeros = [weight.new_zeros(len(weight)) for weight, _ in parts]
    chosen = [zero if b is None else b for (_, b), zero in zip(parts, zeros, strict=True)]
    return torch.cat([bias.detach() for bias in chosen])


def _fits_half(weight: Tensor) -> bool:
    """Whether float16 has a number for each; without the copy that an absolute value would be."""
    least, most = weight.aminmax()
    return bool(least >= -LARGEST_HALF and most <= LARGEST_HALF)


def _has_fbgemm() -> bool:
    engine = torch.backends.quantized.engine
    return engine in ("fbgemm", "x86") and hasattr(torch.ops.quantized, "linear_prepack_fp16")
