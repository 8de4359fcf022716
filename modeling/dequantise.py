"""Turn quantised weights back into numbers; pure functions of the tensors that are stored.

A stored byte stands for one value or two (a table says which), and a block of neighbouring values
shares a scale. The product is computed in float32, as bitsandbytes, compressed-tensors and
transformers compute it, and rounded once to the type asked for. A piece is done at a time, so that
little but the result takes memory.

Sources: FP8 in blocks, DeepSeek-V3 (https://arxiv.org/abs/2412.19437), section 3.3.2; NF4 and
double quantisation, QLoRA (https://arxiv.org/abs/2305.14314), section 3; rows of int8, LLM.int8()
(https://arxiv.org/abs/2208.07339), section 2; MXFP4, OCP Microscaling Formats 1.0, section 5.

Letters: R rows, C columns, n x k the rows and columns of a block.
"""

import math

import torch
from torch import Tensor

PIECE_VALUES = 1 << 22  # computed at a time, in 40 MiB; less is not worth the waking of threads
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # the four-bit float, without its sign
ONE_127TH = 7.874015718698502e-3  # as bitsandbytes writes it
MX_BLOCK = 32  # values that share a scale in a Microscaling format


def scaled(
    weight: Tensor, scale: Tensor, *, block: tuple[int, int], dtype: torch.dtype,
    factor: float = 1.0,
) -> Tensor:  # fmt: skip
    """One-byte values (..., R, C) times the scales of their blocks, (..., R / n, C / k) rounded up.

    scale: of floats, or uint8 that holds the bytes of float8_e8m0fnu.  factor: of all values.
    """
    rows, columns = weight.shape[-2:]
    scale = scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale
    grid = scale.float().reshape(-1, -(-rows // block[0]), -(-columns // block[1]))
    codes = weight.view(torch.uint8).reshape(-1, rows, columns)
    table = torch.arange(256, dtype=torch.uint8).view(weight.dtype).float()[:, None]
    out = torch.empty(codes.shape, dtype=dtype)
    for one, scales, result in zip(codes, grid, out, strict=True):
        _write(result, one, table, scales, block, factor)
    return out.view(weight.shape)


def four_bits(
    packed: Tensor, absmax: Tensor, values: Tensor, nested_absmax: Tensor | None = None,
    nested_values: Tensor | None = None, *, block: int, nested_block: int = 0,
    nested_offset: float = 0.0, shape: tuple[int, ...], via: torch.dtype, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """bitsandbytes' nf4 and fp4: two values a byte, the high bits first, blocks of the flat tensor.

    packed: of any type and shape.  absmax: one a block; bytes that stand for `nested_values` (256,)
    where the scales are quantised themselves.  values (16,): what four bits stand for.
    via: the type that bitsandbytes gives, before it is cast to `dtype`.
    """
    if nested_absmax is not None:
        table = nested_values.float()[:, None]
        scales = _flat(absmax, table, nested_absmax, nested_block, absmax.numel(), torch.float32)
        absmax = scales + nested_offset
    table = _pairs(values.float(), low_first=False)
    return _flat(packed, table, absmax, block, math.prod(shape), via).to(dtype).view(shape)


def mxfp4(blocks: Tensor, scales: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Microscaling FP4 of fused experts: (E, R, C / 32, 16), (E, R, C / 32) -> (E, C, R).

    Two values a byte, the low bits first; a scale is an exponent. The model holds them transposed.
    """
    experts, rows, groups, _ = blocks.shape
    table = _pairs(torch.tensor([*E2M1, *(-value for value in E2M1)]), low_first=True)
    powers = scales.view(torch.float8_e8m0fnu)
    out = torch.empty(experts, groups * MX_BLOCK, rows, dtype=dtype)
    for codes, power, result in zip(blocks, powers, out, strict=True):
        flat = _flat(codes, table, power, MX_BLOCK, rows * groups * MX_BLOCK, dtype)
        result.copy_(flat.view(rows, -1).T)
    return out


def _flat(
    codes: Tensor, table: Tensor, scale: Tensor, block: int, count: int, dtype: torch.dtype
) -> Tensor:
    """Values (count,) in blocks of the flat tensor, the last of which may be shorter."""
    codes, scale = codes.flatten().view(torch.uint8), scale.float().flatten()
    per_code = table.shape[1]
    blocks, rest = divmod(count, block)
    out = torch.empty(count, dtype=dtype)
    if blocks:
        whole = codes[: blocks * block // per_code].view(blocks, -1)
        result = out[: blocks * block].view(blocks, block)
        _write(result, whole, table, scale[:blocks, None], (1, block))
    if rest:
        last = codes[None, blocks * block // per_code : -(-count // per_code)]
        result = torch.empty(1, last.numel() * per_code, dtype=dtype)
        _write(result, last, table, scale[blocks:, None], (1, block))
        out[-rest:] = result[0, :rest]
    return out


def _write(
    out: Tensor, codes: Tensor, table: Tensor, scale: Tensor, block: tuple[int, int],
    factor: float = 1.0,
) -> None:  # fmt: skip
    """Write table[codes] x scale into `out` (R, C), a piece at a time.

    codes (R, C / v) uint8, table (256, v), scale (R / n, C / k) rounded up.
    """
    rows, columns = out.shape
    width = min(block[1], columns)
    full = columns // width
    # pairs are looked up as one number of 64 bits, which takes a third of the time
    entries = table.contiguous().view(torch.int64 if table.shape[1] == 2 else torch.float32)[:, 0]
    step = max(1, PIECE_VALUES // columns)
    for first in range(0, rows, step):
        piece = slice(first, min(first + step, rows))
        found = entries.index_select(0, codes[piece].flatten().int())
        values = found.view(torch.float32).view(-1, columns)
        scales = scale[torch.arange(piece.start, piece.stop) // block[0]]
        values[:, : full * width].unflatten(1, (full, width)).mul_(scales[:, :full, None])
        if full * width < columns:
            values[:, full * width :].mul_(scales[:, full:])
        out[piece] = values.mul_(factor) if factor != 1.0 else values


def _pairs(values: Tensor, low_first: bool) -> Tensor:
    """What a byte stands for, by what four bits do: (16,) -> (256, 2)."""
    codes = torch.arange(256)
    low, high = values[codes & 15], values[codes >> 4]
    return torch.stack([low, high] if low_first else [high, low], -1)
