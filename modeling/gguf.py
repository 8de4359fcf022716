"""Convert a GGUF file to safetensors, a tensor at a time: memory holds one tensor and one shard.

Names and layouts are mapped by transformers' own GGUF loader; only the loop is ours, because that
loader keeps all dequantised tensors in memory, four times the file at 4 bits.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
    load_gguf_checkpoint,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from modeling.gguf_tokenizer import restore_splitter

SHARD_BYTES = 1 << 30
OTHER_NAMES = {  # llama.cpp's name -> transformers', where they differ by more than punctuation
    "command-r": "cohere", "deepseek2": "deepseek_v2", "deepseek2-ocr": "deepseek_ocr2",
    "gemma-embedding": "gemma3_text", "glm-dsa": "glm_moe_dsa", "granitehybrid": "granitemoehybrid",
    "hunyuan-dense": "hunyuan_v1_dense", "hunyuan-moe": "hunyuan_v1_moe",
    "jina-bert-v3": "jina_embeddings_v3", "llama-embed": "llama", "mimo2": "mimo_v2_flash",
    "nemotron_h_moe": "nemotron_h", "nomic-bert-moe": "nomic_bert", "paddleocr": "paddleocr_vl",
    "phi2": "phi", "starcoder": "gpt_bigcode", "step35": "step3p5", "t5encoder": "t5",
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """An architecture that llama.cpp knows, and what transformers makes of it."""

    name: str  # general.architecture of the file
    model_type: str | None  # of transformers; None where it has no such class
    opens: bool  # whether its files can be converted; else take the model's safetensors


def architectures() -> list[Architecture]:
    """Every architecture of the installed gguf package, which follows llama.cpp's list."""
    from gguf.constants import MODEL_ARCH_NAMES

    known = {_plain(name): name for name in CONFIG_MAPPING_NAMES}
    opened = {_plain(name) for name in (*GGUF_CONFIG_MAPPING, *GGUF_CONFIG_ARCHS)}
    return [
        Architecture(name, OTHER_NAMES.get(name) or known.get(_plain(name)), _plain(name) in opened)
        for name in MODEL_ARCH_NAMES.values()
    ]


def _plain(name: str) -> str:
    return re.sub(r"[-_.]", "", name.lower())


def convert_gguf(file: Path, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a transformers folder with the file's configuration, tokenizer and weights.

    Raises ValueError for an architecture that transformers does not read from GGUF.
    """
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        config = AutoConfig.from_pretrained(**source)
    except ValueError as error:  # "GGUF model with architecture ... is not supported yet"
        raise ValueError(
            f"{file.name} cannot be converted: {error} Take the model's safetensors instead; "
            "docs/architectures.md has what is read from GGUF"
        ) from error
    config.dtype = dtype
    tokenizer = AutoTokenizer.from_pretrained(**source)
    kind, splitter = (_text_field(file, f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    if kind == "gpt2" and splitter:  # llama.cpp's word for byte-level BPE
        restore_splitter(tokenizer, splitter)
    tokenizer.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    write_weights(file, model, folder, dtype)


def _text_field(file: Path, name: str) -> str | None:
    """A text among a GGUF file's facts; None where it is not there."""
    from gguf import GGUFReader

    field = GGUFReader(file).get_field(name)
    return None if field is None else str(field.contents())


def write_weights(file: Path, model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    """Dequantise tensor by tensor into shards, and write their index."""
    from gguf import GGUFReader, dequantize

    parsed: dict[str, Any] = load_gguf_checkpoint(str(file)) | {"tensors": {}}
    config = parsed["config"]
    processor = TENSOR_PROCESSORS.get(config["model_type"], TensorProcessor)(config=config)
    names = get_gguf_hf_weights_map(model, processor)
    shards = ShardWriter(folder)
    for tensor in GGUFReader(file).tensors:
        weights = dequantize(tensor.data, tensor.tensor_type)
        found = processor.process(
            weights=weights, name=tensor.name, tensor_key_mapping=names, parsed_parameters=parsed
        )
        if found.name in names:
            shards.add(names[found.name], torch.from_numpy(found.weights.copy()).to(dtype))
    for name, merged in parsed["tensors"].items():  # experts, which the processor gathers itself
        shards.add(name, merged.to(dtype))
    shards.close()


class ShardWriter:
    """Writes tensors into files of about a gibibyte, and the index of all."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: dict[str, Tensor] = {}
        self._size = self._shards = self._total = 0
        self._index: dict[str, str] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor in."""
        if self._held and self._size + tensor.nbytes > SHARD_BYTES:
            self._write()
        self._held[name] = tensor.contiguous()
        self._size += tensor.nbytes

    def close(self) -> None:
        """Write what is left, and the index."""
        self._write()
        index = {"metadata": {"total_size": self._total}, "weight_map": self._index}
        path = self._folder / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=1), encoding="utf-8")

    def _write(self) -> None:
        self._shards += 1
        name = f"model-{self._shards:05d}.safetensors"
        save_file(self._held, self._folder / name, metadata={"format": "pt"})
        self._index |= dict.fromkeys(self._held, name)
        self._total += self._size
        self._held, self._size = {}, 0
