"""Write a student as one GGUF file, which llama.cpp and all that is built on it can run.

    python -m modeling.export artifacts/distill/student student.gguf                 as it is stored
    python -m modeling.export artifacts/distill/student student.gguf --type q8_0     half the size

The folder is one that transformers opens: config.json, safetensors, tokenizer.json. Types:

    f32 f16 bf16   numbers as they are; a student stored in bfloat16 loses nothing in f32 and bf16
    q8_0           8.5 bits a weight, 32 weights share a scale
    q5_1 ... q4_0  6 to 4.5 bits; rounded to the nearest, not fitted to data. Measure what is left:
                   benchmarks/shipped.py. The embedding and the head stay q8_0

llama.cpp also rounds what goes into a matrix: to the type of the weights in bf16 and f16, to 8 bits
in the others. So its logits differ by more than the file does; in f32 they are ours to rounding.

Norms, biases and other vectors are always f32. Rows that are no multiple of 32 cannot be quantised
and stay f16; how many is said. A student that is no Llama, Mistral, Qwen2 or Mamba, or whose
tokenizer is not byte-level BPE, is refused, with the reason.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf import (
    GGML_QUANT_SIZES,
    GGML_QUANT_VERSION,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFType,
    GGUFWriter,
    LlamaFileType,
    get_tensor_name_map,
    quantize,
    quants,
)
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from modeling.checkpoint import Checkpoint, read_checkpoint
from modeling.describe import licence
from modeling.gguf_layout import Layout, extra_tensors, layout_of
from modeling.gguf_tokenizer import write_tokenizer
from modeling.loading import open_tokenizer
from modeling.teacher import read_config

TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
VOCABULARY = ("token_embd.weight", "output.weight")  # kept at 8 bits when the rest has fewer
AS_STORED = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Entry:
    """One tensor to write."""

    name: str  # llama.cpp's
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    source: str | Tensor  # its name in the checkpoint, or itself

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Its shape in what numpy writes: bytes, but for the two types that numpy has."""
        if self.kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
            return self.shape
        return quants.quant_shape_to_byte_shape(self.shape, self.kind)


def export_gguf(folder: Path, file: Path, kind: str | None = None) -> Counter[str]:
    """Write a folder's model and tokenizer; gives how many tensors there are of each type.

    kind: one of TYPES; None takes that of the stored weights. All or nothing, a tensor at a time.
    Raises ValueError, naming what cannot be written, and FileNotFoundError without a tokenizer.
    """
    config = read_config(folder)
    layout, checkpoint = layout_of(config), read_checkpoint(folder)
    kind = kind or _stored_type(checkpoint)
    entries = list(plan_tensors(checkpoint, config, layout, kind))
    part = file.with_name(f"{file.name}.part")
    writer = GGUFWriter(part, MODEL_ARCH_NAMES[layout.architecture])
    _write_facts(writer, folder, kind)
    layout.describe(writer, config)
    write_tokenizer(writer, open_tokenizer(folder), config.vocab_size)
    for entry in entries:
        plain = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}
        dtype = np.dtype(plain.get(entry.kind, np.uint8))
        size = int(np.prod(entry.stored_shape)) * dtype.itemsize
        writer.add_tensor_info(entry.name, entry.stored_shape, dtype, size, entry.kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            writer.write_tensor_data(_data(entry, checkpoint, config, layout))
        writer.close()
        part.replace(file)
    finally:
        writer.close()
        part.unlink(missing_ok=True)
    return Counter(entry.kind.name.lower() for entry in entries)


def plan_tensors(
    checkpoint: Checkpoint, config: PreTrainedConfig, layout: Layout, kind: str
) -> Iterator[Entry]:
    """What is written, and as what. Raises ValueError for a checkpoint that is not the config's."""
    with torch.device("meta"):
        wanted = AutoModelForCausalLM.from_config(config).state_dict()
    if config.tie_word_embeddings:
        wanted.pop("lm_head.weight")  # llama.cpp takes the embedding where there is no other head
    missing = {
        name: tensor
        for name, tensor in wanted.items()
        if name not in checkpoint.tensors or checkpoint.tensors[name].shape != tensor.shape
    }
    if missing:
        name, tensor = next(iter(missing.items()))
        raise ValueError(
            f"{checkpoint.folder} lacks {len(missing)} of the {len(wanted)} tensors that its "
            f"config.json asks for, or has them in another shape: {name} {tuple(tensor.shape)}"
        )
    names = get_tensor_name_map(layout.architecture, config.num_hidden_layers)
    for name, tensor in extra_tensors(config).items():
        yield Entry(name, tuple(tensor.shape), GGMLQuantizationType.F32, tensor)
    for name, tensor in wanted.items():
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if theirs is None:
            raise ValueError(f"llama.cpp's {layout.architecture.name} has no place for '{name}'")
        shape = tuple(layout.convert(name, tensor, config).shape)
        yield Entry(theirs, shape, _type_of(theirs, shape, layout, kind), name)


def _type_of(name: str, shape: tuple[int, ...], layout: Layout, kind: str) -> GGMLQuantizationType:
    """A tensor's type when `kind` is wished for."""
    if len(shape) == 1 or name.endswith(layout.in_float32):
        return GGMLQuantizationType.F32
    if name in VOCABULARY and kind.startswith(("q4", "q5")):
        kind = "q8_0"
    wished = GGMLQuantizationType[kind.upper()]
    return GGMLQuantizationType.F16 if shape[-1] % GGML_QUANT_SIZES[wished][0] else wished


def _data(
    entry: Entry, checkpoint: Checkpoint, config: PreTrainedConfig, layout: Layout
) -> np.ndarray:
    """Read one tensor and turn it into what is written."""
    tensor = entry.source
    if isinstance(tensor, str):
        with safe_open(checkpoint.tensors[tensor].file, "pt") as file:
            tensor = layout.convert(tensor, file.get_tensor(tensor), config)
    values = tensor.float().contiguous().numpy()
    with np.errstate(over="ignore"):
        data = quantize(values, entry.kind)
    checked = data if entry.kind == GGMLQuantizationType.F16 else values
    if not np.isfinite(checked).all():
        largest = np.abs(values).max()
        raise ValueError(
            f"{entry.source} holds {largest:g}, which {entry.kind.name.lower()} cannot; "
            + ("take bf16 or f32" if np.isfinite(largest) else "the student is broken: train again")
        )
    return data


def _write_facts(writer: GGUFWriter, folder: Path, kind: str) -> None:
    """What every file says of itself."""
    writer.add_type(GGUFType.MODEL)
    writer.add_name(folder.resolve().name)
    if (terms := licence(folder)) is not None:
        writer.add_license(terms)
    exact = LlamaFileType.ALL_F32 if kind == "f32" else LlamaFileType[f"MOSTLY_{kind.upper()}"]
    writer.add_file_type(exact)
    writer.add_quantization_version(GGML_QUANT_VERSION)


def _stored_type(checkpoint: Checkpoint) -> str:
    """The type that most of a checkpoint's bytes are in."""
    sizes: Counter[torch.dtype] = Counter()
    for place in checkpoint.tensors.values():
        sizes[place.dtype] += place.size
    stored = sizes.most_common(1)[0][0]
    if stored not in AS_STORED:
        raise ValueError(f"its weights are {stored}; say with --type what to write")
    return AS_STORED[stored]


def main(arguments: list[str]) -> int:
    """Export one student; errors are one line."""
    parser = argparse.ArgumentParser(
        prog="python -m modeling.export", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("student", type=Path, help="a transformers folder")
    parser.add_argument("file", type=Path, help="the GGUF file to write")
    parser.add_argument("--type", choices=TYPES, help="of the matrices; default: as stored")
    options = parser.parse_args(arguments)
    try:
        counts = export_gguf(options.student, options.file, options.type)
    except (OSError, ValueError) as error:
        print(f"{options.student}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    kinds = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    print(f"{options.file}: {options.file.stat().st_size / 1e6:,.1f} MB; tensors: {kinds}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
