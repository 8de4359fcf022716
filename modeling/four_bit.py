"""Keep a finished model's weights in four bits, and run it from them on a CPU.

    write_four_bit(model, folder, FourBit(group=32))   config.json, weights.safetensors, ...
    model = open_four_bit(folder)                      forward and generate() as before

A linear layer inside the blocks is stored as codes of 4 bits, with a scale and an offset for each
group of neighbours in a row: 5 bits a weight with groups of 32. The range of a group is the one,
of some shrunk ones, that leaves the least squared error. The embedding, and the head that is tied
to it, keep 8 bits with a scale a row. All else stays as it is: norms, convolutions, Mamba's dt_proj
(a bare matrix), a mixture of experts, layers whose sizes do not fit.

Few rows at a time, as in decoding, are multiplied by torch's own 4-bit and 8-bit products, which
are vectorised in bfloat16 alone; more rows, as of a prompt, by the weight unpacked for the moment.
No dependency: bitsandbytes' NF4 unpacks the weight for each token, 6 times as long as torch's
product (0.83 against 0.14 ms for 1536 x 576 on one AVX2 core), and torchao calls the same one.

Measured on one AVX2 core: a student of SmolLM2, distilled, with groups of 32 takes 88 MB (bfloat16
248), decodes 1.33 times as fast as in float32, and its perplexity is 1.24 times its own. Small
models lose much by four bits. The teacher itself loses nothing (1.0002): its published weights have
four bits in groups of 32 already, and groups of 64 tear those (1.30).

Letters: O rows and I columns of a weight, G groups a row, N tokens.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from modeling.backends import compute_dtype
from modeling.blocks import called_linear_layers

WEIGHTS, CONFIG = "weights.safetensors", "four_bit.json"
MOST_ROWS = 8  # that torch's 4-bit product takes; above, unpacking is faster
ROWS_APART = 16  # rows of a weight that torch's packing takes together
SHRUNK = (1.0, 0.95, 0.9, 0.85, 0.8)  # ranges tried, as shares of the whole one


@dataclass(frozen=True)
class FourBit:
    """How weights are stored.  group: neighbours that share a scale: 32, 64, 128 or 256."""

    group: int

    def __post_init__(self) -> None:
        if self.group not in (32, 64, 128, 256):
            raise ValueError(
                f"'group' is {self.group}; torch multiplies groups of 32, 64, 128, 256"
            )


def to_four_bits(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Codes (O, I) uint8 from 0 to 15, and scale and offset of each group, (O, G, 2) bfloat16.

    A value is (code - 8) scale + offset, with both as rounded to bfloat16.
    """
    values = weight.float().unflatten(1, (-1, group))
    low, high = values.amin(2, keepdim=True), values.amax(2, keepdim=True)
    middle, half = (low + high) / 2, (high - low) / 2
    best = None
    for share in SHRUNK:
        step = 2 * half * share / 15
        scale = torch.where(step > 0, step, 1).bfloat16().float()  # 1: a group of equal values
        offset = (middle + step / 2).bfloat16().float()
        codes = ((values - offset) / scale + 8).round_().clamp_(0, 15)
        error = ((codes - 8) * scale + offset - values).square_().sum(2, keepdim=True)
        found = (error, codes, scale, offset)
        if best is not None:
            better = error < best[0]
            found = [torch.where(better, new, old) for new, old in zip(found, best, strict=True)]
        best = found
    _, codes, scale, offset = best
    return codes.flatten(1).to(torch.uint8), torch.cat([scale, offset], 2).bfloat16()


def from_four_bits(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight (O, I) that codes (O, I) and scales (O, G, 2) stand for."""
    grouped = codes.to(dtype).unflatten(1, (scales.shape[1], -1)).sub_(8)
    scale, offset = scales.to(dtype).split(1, 2)
    return grouped.mul_(scale).add_(offset).flatten(1)


def to_eight_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (O, I) int8 and a scale for each row, (O,) bfloat16."""
    scale = (weight.float().abs().amax(1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    scale = scale.bfloat16()
    codes = (weight.float() / scale.float()[:, None]).round_().clamp_(-127, 127)
    return codes.to(torch.int8), scale


class FourBitLinear(nn.Module):
    """A linear layer that holds its weight in four bits: (..., I) -> (..., O)."""

    def __init__(self, bytes: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        """bytes (O, I / 2): two codes each, the low bits first. scales (O, G, 2)."""
        super().__init__()
        codes = torch.stack([bytes & 15, bytes >> 4], -1).flatten(1)
        self.out_features, self.in_features = codes.shape
        self.group = self.in_features // scales.shape[1]
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
        self.register_buffer("packed", packed)
        self.register_buffer("bytes", bytes)
        self.register_buffer("scales", scales)
        self.register_buffer("by_group", scales.transpose(0, 1).contiguous())
        self.register_buffer("bias", bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """The product, in the type of what goes in."""
        x = hidden.reshape(-1, self.in_features)
        if len(x) <= MOST_ROWS:
            out = torch.ops.aten._weight_int4pack_mm_for_cpu(
                x.bfloat16().contiguous(), self.packed, self.group, self.by_group
            ).to(x.dtype)
        else:
            out = x @ self.unpacked(x.dtype).T
        if self.bias is not None:
            out = out + self.bias.to(out.dtype)
        return out.view(*hidden.shape[:-1], -1)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """The weight (O, I)."""
        codes = torch.stack([self.bytes & 15, self.bytes >> 4], -1).flatten(1)
        return from_four_bits(codes, self.scales, dtype)


class EightBitRows(nn.Module):
    """An embedding or a head that holds its rows in eight bits."""

    def __init__(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)


class EightBitEmbedding(EightBitRows):
    """Token ids (...) -> (..., I)."""

    def forward(self, ids: Tensor) -> Tensor:
        """Rows of the embedding."""
        return self.codes[ids].to(self.dtype) * self.scales[ids].to(self.dtype)[..., None]


class EightBitHead(EightBitRows):
    """(..., I) -> (..., O), without a bias."""

    @property
    def weight(self) -> Tensor:
        """The weight (O, I), unpacked."""
        return self.codes.to(self.dtype) * self.scales.to(self.dtype)[:, None]

    def forward(self, hidden: Tensor) -> Tensor:
        """The logits, in the type of what goes in."""
        x = hidden.reshape(-1, hidden.shape[-1])
        if len(x) <= MOST_ROWS:
            out = torch.ops.aten._weight_int8pack_mm(
                x.bfloat16().contiguous(), self.codes, self.scales
            )
            out = out.to(x.dtype)
        else:
            out = x @ self.weight.to(x.dtype).T
        return out.view(*hidden.shape[:-1], -1)


def write_four_bit(model: PreTrainedModel, folder: Path, form: FourBit) -> None:
    """Write a model's configuration and its weights in four bits."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    linear, rows = [], {}
    for name in called_linear_layers(model):
        weight = tensors[f"{name}.weight"]
        if weight.shape[1] % form.group == 0 and weight.shape[0] % ROWS_APART == 0:
            codes, scales = to_four_bits(tensors.pop(f"{name}.weight"), form.group)
            tensors[f"{name}.bytes"] = codes[:, ::2] | codes[:, 1::2] << 4
            tensors[f"{name}.scales"] = scales
            linear.append(name)
    for kind, module in _vocabulary(model).items():
        name = next(n for n, m in model.named_modules() if m is module)
        weight = tensors.pop(f"{name}.weight")
        if kind == "embedding" or not model.config.get_text_config().tie_word_embeddings:
            tensors[f"{name}.codes"], tensors[f"{name}.scales"] = to_eight_bits(weight)
        rows[kind] = name
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
    model.config.save_pretrained(folder)
    text = json.dumps({**asdict(form), "linear": linear, **rows}, indent=1)
    (folder / CONFIG).write_text(text, encoding="utf-8")


def _vocabulary(model: PreTrainedModel) -> dict[str, nn.Module]:
    return {"embedding": model.get_input_embeddings(), "head": model.get_output_embeddings()}


def open_four_bit(folder: Path) -> PreTrainedModel:
    """Open what `write_four_bit` wrote, for use on a CPU; it cannot be trained.

    Raises FileNotFoundError for a folder without such a model.
    """
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} holds no model in four bits ({CONFIG} is missing)")
    form = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    dtype = compute_dtype(torch.device("cpu"))
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    tensors = load_file(folder / WEIGHTS)
    for name in form["linear"]:
        parts = (tensors.pop(f"{name}.{part}") for part in ("bytes", "scales"))
        model.set_submodule(name, FourBitLinear(*parts, tensors.pop(f"{name}.bias", None)))
    name, head = form["embedding"], form["head"]
    codes = tensors.pop(f"{name}.codes"), tensors.pop(f"{name}.scales")
    own = (tensors.pop(f"{head}.codes"), tensors.pop(f"{head}.scales")) \
        if f"{head}.codes" in tensors else codes  # fmt: skip
    model.set_submodule(name, EightBitEmbedding(*codes, dtype))
    model.set_submodule(head, EightBitHead(*own, dtype))
    missing, unknown = model.load_state_dict(tensors, strict=False)
    packed = (FourBitLinear, EightBitRows)
    held = {f"{n}.{b}" for n, m in model.named_modules() if isinstance(m, packed)
            for b, _ in m.named_buffers()}  # fmt: skip
    if unknown or set(missing) - held:
        raise ValueError(
            f"{folder / WEIGHTS} does not fit its config.json: missing "
            f"{sorted(set(missing) - held)[:3]}, unknown {unknown[:3]}; write it again"
        )
    return model
