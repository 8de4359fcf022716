"""Random Llama checkpoints of real sizes, written a tensor at a time; their pages in memory."""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SHARD_BYTES = 1 << 30  # a file ends with the tensor that takes it past this, or a third of all


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes; its head is not tied to its embedding."""

    blocks: int
    width: int
    heads: int
    kv_heads: int
    mlp: int
    vocabulary: int
    sparse: bool = False  # the blocks' matrices are holes in the file: zeros that take no disk

    def config(self) -> dict:
        """As config.json says it."""
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
            "num_hidden_layers": self.blocks, "hidden_size": self.width,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads,
            "intermediate_size": self.mlp, "vocab_size": self.vocabulary,
            "tie_word_embeddings": False, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
            "bos_token_id": 1, "eos_token_id": 2,
        }  # fmt: skip

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...], float]]:
        """Name, shape and standard deviation of each; 0 for the ones of a norm."""
        wide, kv = self.width, self.width // self.heads * self.kv_heads
        std, out = wide**-0.5, (2 * self.blocks * self.mlp) ** -0.5  # states keep their size
        yield "model.embed_tokens.weight", (self.vocabulary, wide), 1.0
        for index in range(self.blocks):
            block = f"model.layers.{index}."
            yield block + "input_layernorm.weight", (wide,), 0.0
            yield block + "self_attn.q_proj.weight", (wide, wide), std
            yield block + "self_attn.k_proj.weight", (kv, wide), std
            yield block + "self_attn.v_proj.weight", (kv, wide), std
            yield block + "self_attn.o_proj.weight", (wide, wide), std
            yield block + "post_attention_layernorm.weight", (wide,), 0.0
            yield block + "mlp.gate_proj.weight", (self.mlp, wide), std
            yield block + "mlp.up_proj.weight", (self.mlp, wide), std
            yield block + "mlp.down_proj.weight", (wide, self.mlp), out
        yield "model.norm.weight", (wide,), 0.0
        yield "lm_head.weight", (self.vocabulary, wide), std


SHAPES = {
    "tiny": Shape(4, 128, 4, 2, 256, 16000),
    "1b": Shape(22, 2048, 32, 4, 5632, 32000),  # 1.1 billion parameters
    "3b": Shape(26, 3200, 32, 32, 8640, 32000),  # 3.4 billion
    "70b": Shape(80, 8192, 64, 8, 28672, 128256, sparse=True),
}


def checkpoint(folder: Path, size: str) -> Path:
    """A checkpoint of that size below a folder, written if it is not there yet."""
    target = folder / size
    if not (target / "config.json").is_file():  # written last
        target.mkdir(parents=True, exist_ok=True)
        print(f"writing {target}", flush=True)
        _write(target, SHAPES[size])
    return target


def weight_files(folder: Path) -> list[Path]:
    """Files that hold weights, in order."""
    return sorted(folder.rglob("*.safetensors"))


def size_of(folder: Path) -> int:
    """Bytes of all files that hold weights."""
    return sum(file.stat().st_size for file in weight_files(folder))


def drop_pages(*folders: Path) -> None:
    """Forget the pages of all weight files below folders, but for those that are mapped."""
    for file in (file for folder in folders for file in weight_files(folder)):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _write(folder: Path, shape: Shape) -> None:
    shards: list[list[tuple[str, tuple[int, ...], float]]] = [[]]
    total = sum(2 * math.prod(sizes) for _, sizes, _ in shape.tensors())
    size = 0
    for tensor in shape.tensors():
        if size >= min(SHARD_BYTES, total // 3):
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += 2 * math.prod(tensor[1])
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(folder / name, shard, number, shape.sparse)
        weight_map.update(dict.fromkeys((tensor[0] for tensor in shard), name))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=1))


def _write_shard(
    file: Path, tensors: list[tuple[str, tuple[int, ...], float]], seed: int, sparse: bool
) -> None:
    """Write one file in the format that modeling/checkpoint.py describes."""
    import torch

    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, shape, _ in tensors:
        end = at + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that tensors are aligned
    generator = torch.Generator().manual_seed(seed)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, shape, deviation in tensors:
            if sparse and deviation and ".layers." in name:
                stream.seek(2 * math.prod(shape), os.SEEK_CUR)
                continue
            values = torch.ones(shape, dtype=torch.bfloat16)
            if deviation:
                values.normal_(0, deviation, generator=generator)
            if name == "lm_head.weight":  # tokens differ in how likely they are: fewer ties
                values *= torch.randn(shape[0], 1, generator=generator).exp_().bfloat16()
            stream.write(memoryview(values.view(torch.int16).numpy()))
        stream.truncate()
