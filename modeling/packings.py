"""How each method of quantisation stores a weight: which tensors it is made of, and their sizes.

A method's function gives the weights that it finds among a checkpoint's tensors, from their names,
types and shapes alone. What does not fit together is refused here, before any weight is read.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch

from modeling.checkpoint import BadCheckpoint, Packed, Place
from modeling.dequantise import MX_BLOCK, ONE_127TH, four_bits, mxfp4, scaled

Places = Mapping[str, Place]
Found = Iterator[tuple[str, Packed]]
Block = tuple[int | None, int | None]  # rows and columns that share a scale; None for all of them
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
INT8 = (torch.int8,)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FOUR_BIT, STATE = ("nf4", "fp4"), ".quant_state.bitsandbytes__"
FOUR_BIT_TYPES = {"float32": FLOATS[0], "bfloat16": FLOATS[1], "float16": FLOATS[2]}
FOUR_BIT_BLOCKS = {32, 64, 128, 256, 512, 1024, 2048, 4096}
SHAPED = ("float-quantized", "int-quantized", "naive-quantized")  # a byte a value, in its shape


def _fine_grained(places: Places, settings: dict, dtype: torch.dtype) -> Found:
    """FP8 with a scale for each block of a weight, or for all of it (DeepSeek-V3, Qwen3)."""
    block = tuple(settings.get("weight_block_size") or (None, None))
    for scale in _ending(places, "_scale_inv"):
        name = scale.removesuffix("_scale_inv")
        exponents = settings.get("scale_fmt") == "ue8m0"
        yield name, _scaled(places, name, scale, FP8, [block], dtype, exponents)


def _by_rows(places: Places, settings: dict, dtype: torch.dtype) -> Found:
    """FP8 with a scale for each row (FBGEMM)."""
    del settings
    for scale in _ending(places, ".weight_scale"):
        name = scale.removesuffix("_scale")
        yield name, _scaled(places, name, scale, FP8, [(1, None)], dtype)


def _compressed(places: Places, settings: dict, dtype: torch.dtype) -> Found:
    """FP8 and int8 of compressed-tensors, with scales as its groups state them."""
    form, status = settings.get("format"), settings.get("quantization_status", "compressed")
    sparse = (settings.get("sparsity_config") or {}).get("format", "dense")
    rotated = bool((settings.get("transform_config") or {}).get("config_groups"))
    if (form in SHAPED, status, sparse, rotated) != (True, "compressed", "dense", False):
        raise ValueError(
            f"a checkpoint of compressed-tensors is read when its format is {_or(SHAPED)}, "
            f"compressed, dense and without transforms; this one's is {form}, {status}, {sparse}, "
            f"{'with' if rotated else 'without'} transforms; take the model as it was before it"
        )
    groups = settings.get("config_groups", {}).values()
    blocks = [_block_of(group["weights"]) for group in groups if group.get("weights")]
    for scale in _ending(places, ".weight_scale"):
        name = scale.removesuffix("_scale")
        if f"{name}_zero_point" in places:
            wanted = "absent: weights with zero points are not read"
            raise _wrong(f"{name}_zero_point", places[f"{name}_zero_point"], wanted)
        yield name, _scaled(places, name, scale, (*FP8, *INT8), blocks, dtype)


def _block_of(weights: dict) -> Block:
    """What shares a scale, by a group's settings."""
    strategy = weights.get("strategy")
    if strategy not in ("tensor", "channel", "group", "block"):
        raise ValueError(f"scales of compressed-tensors by '{strategy}' are not read")
    if strategy == "block":
        return tuple(weights["block_structure"])
    return (None if strategy == "tensor" else 1, weights.get("group_size"))


def _bitsandbytes(places: Places, settings: dict, dtype: torch.dtype) -> Found:
    """int8 with a scale for each row, and four bits in blocks."""
    del settings  # each tensor says it itself
    for scale in _ending(places, ".SCB"):
        name = scale.removesuffix("SCB") + "weight"
        order = places.get(f"{name}_format")
        if order is not None and any(_read(order)):
            raise _wrong(f"{name}_format", order, "0, row by row; the others are of old GPUs")
        packed = _scaled(places, name, scale, INT8, [(1, None)], dtype, factor=ONE_127TH)
        yield name, replace(packed, beside=(f"{name}_format",))
    for absmax in _ending(places, ".absmax"):
        name = absmax.removesuffix(".absmax")
        yield name, _four_bits(places, name, dtype)


def _mxfp4(places: Places, settings: dict, dtype: torch.dtype) -> Found:
    """Blocks of four-bit floats with an exponent each, of fused experts (gpt-oss)."""
    del settings
    for blocks in _ending(places, "_blocks"):
        name = blocks.removesuffix("_blocks")
        stored = _needed(places, name, blocks, f"{name}_scales")
        codes, scales = stored.values()
        if (codes.dtype, *codes.shape[3:]) != (torch.uint8, MX_BLOCK // 2):
            wanted = f"torch.uint8 of (experts, rows, columns / {MX_BLOCK}, {MX_BLOCK // 2})"
            raise _wrong(blocks, codes, wanted)
        if (scales.dtype, scales.shape) != (torch.uint8, codes.shape[:-1]):
            raise _wrong(f"{name}_scales", scales, f"torch.uint8 of {codes.shape[:-1]}")
        experts, rows, groups = scales.shape
        shape = (experts, groups * MX_BLOCK, rows)
        yield name, Packed("mxfp4", stored, partial(mxfp4, dtype=dtype), dtype, shape)


PACKINGS: dict[str, Callable[[Places, dict, torch.dtype], Found]] = {
    "fp8": _fine_grained,
    "fbgemm_fp8": _by_rows,
    "compressed-tensors": _compressed,
    "bitsandbytes": _bitsandbytes,
    "mxfp4": _mxfp4,
}


# --- what a weight is made of ----------------------------------------------------------------


def _scaled(
    places: Places, name: str, scale: str, types: tuple[torch.dtype, ...], blocks: list[Block],
    dtype: torch.dtype, exponents: bool = False, factor: float = 1.0,
) -> Packed:  # fmt: skip
    """A weight of one-byte values and its scales.

    types: that it may have.  blocks: that may share a scale; the shape of the scales says which.
    """
    stored = _needed(places, scale, name, scale)
    weight, scales = stored[name], stored[scale]
    if weight.dtype not in types or len(weight.shape) < 2 or not weight.size:
        raise _wrong(name, weight, f"a matrix of {_or(types)}, though it has scales")
    floats = (*FLOATS, torch.float8_e8m0fnu, *([torch.uint8] if exponents else []))
    if scales.dtype not in floats:
        raise _wrong(scale, scales, _or(floats))
    grids = _grids(weight.shape, blocks)
    if scales.shape not in grids:
        raise _wrong(scale, scales, f"{_or(grids)} for a weight of {weight.shape}")
    how = partial(scaled, block=grids[scales.shape], dtype=dtype, factor=factor)
    return Packed(str(weight.dtype).removeprefix("torch."), stored, how, dtype, weight.shape)


def _grids(shape: tuple[int, ...], blocks: list[Block]) -> dict[tuple, tuple[int, int]]:
    """The shapes that a weight's scales may have -> rows and columns of a block."""
    *experts, rows, columns = shape
    grids: dict[tuple, tuple[int, int]] = {}
    for block in blocks:
        n, k = block[0] or rows, block[1] or columns
        grid = (*experts, -(-rows // n), -(-columns // k))
        grids[grid] = n, k
        if block[1] is None:
            grids[grid[:-1]] = n, k
        if block == (None, None) and not experts:
            grids[()] = n, k
    return grids


def _four_bits(places: Places, name: str, dtype: torch.dtype) -> Packed:
    """A weight of four bits a value, whose sizes stand beside it in JSON."""
    form = next((f for f in FOUR_BIT if f"{name}{STATE}{f}" in places), FOUR_BIT[0])
    parts = [name, f"{name}.absmax", f"{name}.quant_map"]
    nested = f"{name}.nested_absmax" in places
    if nested:
        parts += [f"{name}.nested_absmax", f"{name}.nested_quant_map"]
    about = f"{name}{STATE}{form}"
    stored = _needed(places, name, *parts, about)
    state = stored.pop(about)
    try:
        said = json.loads(_read(state))
        shape, via, block = torch.Size(said["shape"]), FOUR_BIT_TYPES[said["dtype"]], {}
        block["block"] = int(said["blocksize"])
        if nested:
            block["nested_block"] = int(said["nested_blocksize"])
        if set(block.values()) - FOUR_BIT_BLOCKS:
            raise ValueError(f"blocks of {block}")
        offset = {"nested_offset": float(said["nested_offset"])} if nested else {}
    except (ValueError, KeyError, TypeError) as error:
        wanted = f"JSON of sizes that bitsandbytes has ({error!r})"
        raise _wrong(about, state, wanted) from error
    scales = -(-shape.numel() // block["block"])
    sizes = [-(-shape.numel() // 2), scales if nested else 4 * scales, 4 * 16]
    sizes += [4 * -(-scales // block["nested_block"]), 4 * 256] if nested else []
    for part, size in zip(stored, sizes, strict=True):
        if stored[part].size != size:
            raise _wrong(part, stored[part], f"the {size} bytes of {tuple(shape)} in {form}")
    how = partial(four_bits, **block, **offset, shape=shape, via=via, dtype=dtype)
    form = f"nested {form}" if nested else form
    return Packed(form, stored, how, dtype, tuple(shape), (about,))


def _needed(places: Places, of: str, *names: str) -> dict[str, Place]:
    """The places of what a weight is made of."""
    if missing := [name for name in names if name not in places]:
        raise BadCheckpoint(
            f"'{of}' is part of a quantised weight, but the checkpoint lacks '{missing[0]}', which "
            "it takes to unpack it; a file is gone, or was written by another version"
        )
    return {name: places[name] for name in names}


def _wrong(name: str, place: Place, wanted: object) -> BadCheckpoint:
    return BadCheckpoint(
        f"{place.file}: '{name}' is {place.dtype} of {place.shape}, not {wanted}; the checkpoint "
        "is damaged, or its quantization_config is of another"
    )


def _or(choices: Iterable[object]) -> str:
    return " or ".join(map(str, choices))


def _ending(places: Places, suffix: str) -> list[str]:
    return [name for name in places if name.endswith(suffix)]


def _read(place: Place) -> bytes:
    """A few bytes that say how others are to be read."""
    with place.file.open("rb") as stream:
        stream.seek(place.offset)
        return stream.read(place.size)
