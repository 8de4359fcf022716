"""Convert a GGUF file to safetensors, a tensor at a time: memory holds one tensor and one shard.

Names and layouts are mapped by transformers' own GGUF loader; only the loop is ours, because that
loader keeps all dequantised tensors in memory, four times the file at 4 bits.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
    load_gguf_checkpoint,
)

SHARD_BYTES = 1 << 30


def convert_gguf(file: Path, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a transformers folder with the file's configuration, tokenizer and weights.

    Raises ValueError for an architecture that transformers does not read from GGUF.
    """
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    config = AutoConfig.from_pretrained(**source)
    config.dtype = dtype
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    write_weights(file, model, folder, dtype)


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
