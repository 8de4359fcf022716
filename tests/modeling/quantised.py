"""Quantised checkpoints, written as the formats are published; without the libraries that do it.

    stored, weight = FORMS[form].encode("layer.weight", tensor)

gives the tensors that are stored, and what the stored ones stand for, in float32: written out with
no regard for memory, a scale for every value.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from tests.causal_lms import tiny_config, tiny_model

Encoded = tuple[dict[str, Tensor], Tensor]
NF4 = [  # QLoRA, appendix E
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip
FP4 = [0, 0.0052083333, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4]  # bitsandbytes' own
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
TABLES = {"nf4": NF4, "fp4": [*FP4, *(-value for value in FP4)]}
INTERMEDIATE = 64  # of gpt-oss, in whole blocks of 32


@dataclass(frozen=True)
class Form:
    """A way to store a weight: its encoder, and what the configuration says of it."""

    encode: Callable[[str, Tensor], Encoded]
    settings: dict[str, Any]
    family: str = "llama"
    shown: str = ""  # how it is described
    ends: tuple[str, ...] = field(default=("_proj.weight",))  # of the weights that are stored in it


def spread(scale: Tensor, block: tuple[int, int], shape: torch.Size) -> Tensor:
    """A scale for every value of a matrix."""
    whole = scale.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return whole[: shape[0], : shape[1]]


def largest(weight: Tensor, block: tuple[int, int]) -> Tensor:
    """The largest magnitude of each block of a matrix."""
    rows = [[p.abs().max() for p in part.split(block[1], 1)] for part in weight.split(block[0])]
    return torch.tensor(rows)


def fp8(
    name: str, weight: Tensor, block: tuple[int, int] | None = (16, 20), suffix: str = "_scale_inv",
    shape: tuple[int, ...] | None = None, scales: torch.dtype = torch.float32,
) -> Encoded:  # fmt: skip
    """FP8 of 4 bits exponent; `shape` is that of the scales where it is not the grid's."""
    block = block or tuple(weight.shape)
    block = (block[0], min(block[1], weight.shape[1]))
    scale = (largest(weight, block) / 448).to(scales)
    for_each = spread(scale, block, weight.shape)
    stored = (weight / for_each).clamp(-448, 448).to(torch.float8_e4m3fn)
    kept = scale if shape is None else scale.reshape(shape)
    return {name: stored, name + suffix: kept}, stored.float() * for_each


def int8(name: str, weight: Tensor, suffix: str, whole: float = 1.0) -> Encoded:
    """A scale a row, which stands for `whole` of 127 steps."""
    scale = largest(weight, (1, weight.shape[1])) / 127 * whole
    stored = (weight / scale * whole).round().to(torch.int8)
    expected = stored.float() * scale
    if whole != 1.0:
        expected = expected * 7.874015718698502e-3
    return {name: stored, name.removesuffix("weight") + suffix: scale}, expected


def bnb_int8(name: str, weight: Tensor) -> Encoded:
    stored, expected = int8(name, weight, "SCB", 127.0)
    scale = stored[name.removesuffix("weight") + "SCB"]
    stored[name.removesuffix("weight") + "SCB"] = scale.flatten()
    return stored | {f"{name}_format": torch.tensor(0, dtype=torch.uint8)}, expected


def nearest(values: Tensor, table: Tensor) -> Tensor:
    return (values[..., None] - table).abs().argmin(-1)


def four_bits(name: str, weight: Tensor, form: str, nested: bool, block: int = 64) -> Encoded:
    """Flat blocks, the last one shorter; two values a byte, the first in the high bits."""
    table = torch.tensor(TABLES[form])
    parts = list(weight.flatten().split(block))
    absmax = torch.stack([part.abs().max() for part in parts])
    stored, said = {f"{name}.absmax": absmax}, {}
    if nested:
        offset = absmax.mean()
        levels = torch.linspace(-1, 1, 256)
        top = torch.stack([part.abs().max() for part in (absmax - offset).split(256)])
        spread_top = top.repeat_interleave(256)[: len(absmax)]
        codes = nearest((absmax - offset) / spread_top, levels)
        absmax = levels[codes] * spread_top + offset
        stored = {
            f"{name}.absmax": codes.to(torch.uint8), f"{name}.nested_absmax": top,
            f"{name}.nested_quant_map": levels,
        }  # fmt: skip
        said = {
            "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset.item()
        }  # fmt: skip
    codes = torch.cat([nearest(p / m, table) for p, m in zip(parts, absmax, strict=True)])
    expected = table[codes] * absmax.repeat_interleave(block)[: len(codes)]
    high, low = torch.nn.functional.pad(codes, (0, len(codes) % 2)).view(-1, 2).T
    said |= {
        "quant_type": form, "blocksize": block, "dtype": "bfloat16", "shape": list(weight.shape)
    }  # fmt: skip
    state = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)
    stored |= {
        name: (high * 16 + low).to(torch.uint8)[:, None], f"{name}.quant_map": table,
        f"{name}.quant_state.bitsandbytes__{form}": state,
    }  # fmt: skip
    return stored, expected.view(weight.shape)


def mxfp4(name: str, weight: Tensor) -> Encoded:
    """Fused experts (E, C, R), stored by rows: two values a byte, the first in the low bits."""
    table = torch.tensor([*E2M1, *(-value for value in E2M1)])
    groups = weight.transpose(1, 2).unflatten(-1, (-1, 32))  # (E, R, C / 32, 32)
    exponents = groups.abs().amax(-1).log2().floor() - 2
    codes = nearest(groups / exponents.exp2()[..., None], table)
    expected = (table[codes] * exponents.exp2()[..., None]).flatten(2).transpose(1, 2)
    packed = codes[..., 0::2] + 16 * codes[..., 1::2]
    stored = {"_blocks": packed, "_scales": exponents + 127}
    return {f"{name}{end}": part.to(torch.uint8) for end, part in stored.items()}, expected


def compressed(strategy: str, kind: str = "float", **more: Any) -> dict[str, Any]:
    """What llm-compressor writes."""
    weights = {"num_bits": 8, "type": kind, "strategy": strategy, "symmetric": True, **more}
    return {
        "quant_method": "compressed-tensors", "format": f"{kind}-quantized",
        "quantization_status": "compressed", "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }  # fmt: skip


FINE = {"quant_method": "fp8", "weight_block_size": [16, 20]}  # which divide no weight
WHOLE = {"quant_method": "fp8", "weight_block_size": [16, 16]}
BNB4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "_load_in_4bit": True}
BNB8 = {"quant_method": "bitsandbytes", "load_in_8bit": True, "_load_in_8bit": True}
BY_SCALE = partial(fp8, suffix="_scale")
FORMS = {
    "fp8": Form(fp8, FINE, shown="float8_e4m3fn"),
    "fp8, experts": Form(partial(fp8, block=(16, 16)), WHOLE, "qwen3_moe", "float8_e4m3fn"),
    "fp8, latent attention": Form(fp8, FINE, "deepseek_v3", "float8_e4m3fn"),
    "fp8, powers of two": Form(
        partial(fp8, block=(16, 16), scales=torch.float8_e8m0fnu), WHOLE, shown="float8_e4m3fn"
    ),
    "fp8, one scale": Form(
        partial(fp8, block=None, shape=()), {"quant_method": "fp8"}, shown="float8_e4m3fn"
    ),
    "fp8, with the head": Form(
        fp8, FINE, shown="float8_e4m3fn", ends=("_proj.weight", "lm_head.weight")
    ),
    "fbgemm": Form(
        partial(BY_SCALE, block=(1, 10**6)), {"quant_method": "fbgemm_fp8"}, shown="float8_e4m3fn"
    ),
    "compressed, one scale": Form(
        partial(BY_SCALE, block=None, shape=(1,)), compressed("tensor"), shown="float8_e4m3fn"
    ),
    "compressed, by rows": Form(
        partial(BY_SCALE, block=(1, 10**6), scales=torch.bfloat16), compressed("channel"),
        "qwen3_moe", "float8_e4m3fn",
    ),
    "compressed, by blocks": Form(
        partial(BY_SCALE, block=(16, 16)), compressed("block", block_structure=[16, 16]),
        shown="float8_e4m3fn",
    ),
    "compressed, by groups": Form(
        partial(BY_SCALE, block=(1, 16)), compressed("group", group_size=16), shown="float8_e4m3fn"
    ),
    "compressed, int8": Form(
        partial(int8, suffix="weight_scale"), compressed("channel", "int"), shown="int8"
    ),
    "int8": Form(bnb_int8, BNB8, shown="int8"),
    "int8, experts": Form(
        bnb_int8, BNB8, "mixtral", "int8", ("_proj.weight", *(f".w{n}.weight" for n in (1, 2, 3)))
    ),
    "nf4": Form(partial(four_bits, form="nf4", nested=False), BNB4, shown="nf4"),
    "nested nf4": Form(partial(four_bits, form="nf4", nested=True), BNB4, shown="nested nf4"),
    "fp4": Form(partial(four_bits, form="fp4", nested=False), BNB4, shown="fp4"),
    "nf4, experts": Form(
        partial(four_bits, form="nf4", nested=True), BNB4, "qwen3_moe", "nested nf4"
    ),
    "mxfp4": Form(
        mxfp4, {"quant_method": "mxfp4"}, "gpt_oss", "mxfp4", ("gate_up_proj", "down_proj")
    ),
}  # fmt: skip


def tiny(family: str) -> PreTrainedModel:
    """A tiny model of a family; of gpt-oss, one whose sizes are whole blocks."""
    if family != "gpt_oss":
        return tiny_model(family)
    config = tiny_config(family)
    config.intermediate_size = INTERMEDIATE
    torch.manual_seed(0)
    return type(tiny_model(family))(config).float().eval()


def write(form: Form, folder: Path) -> tuple[Path, Path]:
    """Save a tiny model quantised, and as what that stands for; gives both folders."""
    quantised, plain = folder / "quantised", folder / "plain"
    model = tiny(form.family).bfloat16()
    for place in (quantised, plain):
        model.save_pretrained(place)
    state = load_file(plain / "model.safetensors")
    stored: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith(form.ends):
            encoded, weight = form.encode(name, tensor.float())
            stored |= encoded
            state[name] = weight.to(torch.bfloat16).contiguous()
        else:
            stored[name] = tensor
    save(stored, quantised)
    save(state, plain)
    settle(quantised, form.settings)
    return quantised, plain


def save(tensors: dict[str, Tensor], folder: Path) -> None:
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})


def settle(folder: Path, settings: dict[str, Any] | None) -> None:
    """Write what config.json says of quantisation."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config))
