"""Will it fit? Real bytes, from the checkpoint's headers and the system, before anything is loaded.

The seeds' estimate (12 L D^2 parameters at 4 bits) counts neither the vocabulary nor experts; here
the sizes are those of the tensors on disk in the type that they will have in memory, unpacked where
they are stored quantised.
"""

import math
import resource
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import torch

    from modeling.checkpoint import Checkpoint, Packed, Place

GIB = 1 << 30
RESERVE_BYTES = 200 << 20  # for what else a stage has, once its imports are done
RESIDENT, STREAMED = "resident", "streamed"
ENGINES = ("auto", RESIDENT, STREAMED)
CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


@dataclass(frozen=True)
class Need:
    """What running a data set through a model takes, in bytes."""

    weights: int  # all of them, in the type they are computed in
    blocks: int  # the largest one twice, in use and being read; and what of it has to be converted
    work: int  # activations of a batch and its logits
    token: int  # what one token leaves in memory while it is under way
    batch_tokens: int  # in one batch
    tokens: int  # of all data

    @property
    def resident(self) -> int:
        """With all weights in memory, batch after batch."""
        return self.weights + self.work + self.token * self.batch_tokens + RESERVE_BYTES

    @property
    def streamed(self) -> int:
        """With two blocks in memory, and one batch under way."""
        return self.blocks + self.work + self.token * self.batch_tokens + RESERVE_BYTES

    def tokens_at_once(self, free: int) -> int:
        """How many tokens can be under way together when streamed."""
        left = free - self.blocks - self.work - RESERVE_BYTES
        return max(self.batch_tokens, min(self.tokens, left // self.token))


@dataclass(frozen=True)
class Plan:
    """Which engine runs, how many tokens go through together, and the sentence that says why."""

    engine: str
    tokens_at_once: int
    sentence: str


class WillNotFit(MemoryError):
    """No engine fits into the memory there is; the message says what would."""


def need_of(
    checkpoint: "Checkpoint", blocks: list[list[str]], fused: Collection[str],
    left: Collection[str], dtype: "torch.dtype", batch_tokens: int, tokens: int, width: int,
    vocabulary: int,
) -> Need:  # fmt: skip
    """Add up what a model needs; a block whole, even where fewer of its experts will be read.

    blocks: the checkpoint's tensor names by block.  fused: those that are joined with others.
    left: those that stay on disk when streamed, though they are in no block.  batch_tokens: in one
    batch.  tokens: of all data.  width, vocabulary: of the model.
    """

    def read(names: Collection[str]) -> int:
        return sum(checkpoint.tensors[name].size for name in names)

    def converted(names: Collection[str]) -> int:
        return sum(_bytes_of_copies(checkpoint, name, name in fused, dtype) for name in names)

    def joined(names: Collection[str]) -> int:
        """While a block whose packed experts are fused is put into memory to stay."""
        packed = (name for name in names if name in fused and checkpoint.is_packed(name))
        return sum(2 * bytes_in_memory(checkpoint, name, dtype) for name in packed)

    outside = set(checkpoint.tensors).difference(*blocks)
    two = 2 * max(map(read, blocks), default=0)
    copies = max(map(converted, blocks), default=0) + converted(outside.difference(left))
    work = batch_tokens * (width * 64 + min(vocabulary, 1 << 16) * 2)
    token = 3 * width * dtype.itemsize  # a hidden state, what the head gets, what else is kept
    weights = sum(bytes_in_memory(checkpoint, name, dtype) for name in checkpoint.tensors)
    weights += max(map(joined, blocks), default=0)
    return Need(weights, two + copies, work, token, batch_tokens, tokens)


def _bytes_of_copies(checkpoint: "Checkpoint", name: str, fused: bool, dtype: "torch.dtype") -> int:
    """What a tensor takes beside its place in the buffer, when it is put into the model."""
    in_memory = bytes_in_memory(checkpoint, name, dtype)
    unpacked = in_memory if checkpoint.is_packed(name) else 0
    if fused:
        return unpacked + 2 * in_memory  # stacked, then joined
    return unpacked or (in_memory if _is_cast(checkpoint.tensors[name], dtype) else 0)


def bytes_in_memory(checkpoint: "Checkpoint", name: str, dtype: "torch.dtype") -> int:
    """What a tensor takes once it is loaded to be computed with in a type."""
    place = checkpoint.tensors[name]
    in_memory = dtype if _is_cast(place, dtype) else place.dtype
    return math.prod(place.shape) * in_memory.itemsize


def _is_cast(place: "Place | Packed", dtype: "torch.dtype") -> bool:
    """Whether a tensor is computed in another type than it is stored in."""
    is_float = place.dtype.is_floating_point and place.dtype.itemsize > 1
    return is_float and place.dtype != dtype


def free_bytes(device: "torch.device | None" = None, mapped: int = 0) -> int:
    """Memory that this process may still take.

    On a GPU: what is free there, up to this process's own share of it. On the CPU: of the machine,
    its cgroup and its own limits.
    mapped: bytes of files that it will map; they take no memory, but of its address space.
    """
    if device is not None and device.type == "cuda":
        return _free_on_gpu(device)
    free = [psutil.virtual_memory().available]
    free += [left for folder in _cgroups() if (left := _left_in(folder)) is not None]
    taken = psutil.Process().memory_info()
    for kind, used in (
        (resource.RLIMIT_DATA, taken.data),
        (resource.RLIMIT_AS, taken.vms + mapped),
    ):
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY:
            free.append(soft - used)
    return max(0, min(free))


def _free_on_gpu(device: "torch.device") -> int:
    import torch

    free, total = torch.cuda.mem_get_info(device)
    reserved, used = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    share = torch.cuda.get_per_process_memory_fraction(device)
    return max(0, min(free + reserved - used, int(share * total) - used))


def _cgroups() -> list[Path]:
    """The control groups that this process is in and those around them, of version 1 and 2."""
    found = []
    lines = OWN_CGROUPS.read_text(encoding="utf-8").splitlines() if OWN_CGROUPS.is_file() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            root = CGROUPS / "memory" if controllers else CGROUPS
            here = root / path.strip("/")
            found += [folder for folder in (here, *here.parents) if folder.is_relative_to(root)]
    return found


def _left_in(folder: Path) -> int | None:
    """What a control group may still take, the page cache counted as free; None without a limit."""
    for limit, usage, cache in (
        ("memory.max", "memory.current", "file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache"),
    ):
        if (folder / limit).is_file() and (text := (folder / limit).read_text().strip()) != "max":
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            return int(text) - int((folder / usage).read_text()) + int(stat[cache])
    return None


def choose_engine(need: Need, wanted: str, free: int, where: str = "cpu") -> Plan:
    """Choose how to run: `wanted`, or with "auto" resident where it fits, else streamed.

    where: the device and type that is computed in, for the sentence.

    Raises WillNotFit when even streaming does not fit, ValueError for an unknown engine.
    """
    if wanted not in ENGINES:
        raise ValueError(f"engine '{wanted}' is unknown; there are {', '.join(ENGINES)}")
    numbers = (
        f"resident {need.resident / GIB:.1f} GiB, streamed from {need.streamed / GIB:.1f} GiB, "
        f"free {free / GIB:.1f} GiB"
    )
    if wanted == RESIDENT or (wanted == "auto" and need.resident <= free):
        why = "as asked" if wanted == RESIDENT else "the whole model fits"
        return Plan(RESIDENT, need.batch_tokens, f"resident: {why} ({numbers}); on {where}")
    if need.streamed > free:
        raise WillNotFit(
            f"not even one block at a time fits ({numbers}): a block in use and one being read are "
            f"{need.blocks / GIB:.2f} GiB, a batch of {need.batch_tokens} tokens "
            f"{(need.work + need.token * need.batch_tokens) / GIB:.2f} GiB; lower batch_rows, or "
            f"free {(need.streamed - free) / GIB:.1f} GiB"
        )
    together = need.tokens_at_once(free)
    passes = -(-need.tokens // together)
    return Plan(
        STREAMED, together,
        f"streamed: a block at a time, {passes} pass{'es' * (passes > 1)} of {together} tokens "
        f"({numbers}); on {where}",
    )  # fmt: skip
