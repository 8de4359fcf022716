"""Will it fit? Real bytes, from the checkpoint's headers and the system, before anything is loaded.

The seeds' estimate (12 L D^2 parameters at 4 bits) counts neither the vocabulary nor experts; here
the sizes are those of the tensors on disk in the type that they will have in memory.
"""

import resource
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import torch

    from modeling.checkpoint import Checkpoint

GIB = 1 << 30
RESERVE_BYTES = 400 << 20  # for Python, torch and what else a stage has
RESIDENT, STREAMED = "resident", "streamed"
ENGINES = ("auto", RESIDENT, STREAMED)
CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


@dataclass(frozen=True)
class Need:
    """What running a data set through a model takes, in bytes."""

    weights: int  # all of them, in the type they are computed in
    two_blocks: int  # the largest one twice: in use and being read
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
        return self.two_blocks + self.work + self.token * self.batch_tokens + RESERVE_BYTES

    def tokens_at_once(self, free: int) -> int:
        """How many tokens can be under way together when streamed."""
        left = free - self.two_blocks - self.work - RESERVE_BYTES
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
    checkpoint: "Checkpoint", blocks: list[list[str]], dtype: "torch.dtype", batch_tokens: int,
    tokens: int, width: int, vocabulary: int,
) -> Need:  # fmt: skip
    """Add up what a model needs.

    blocks: the checkpoint's tensor names by block.  batch_tokens: in one batch.  tokens: of all
    data.  width, vocabulary: of the model.
    """

    def size(names: list[str]) -> int:
        return sum(_bytes_in_memory(checkpoint, name, dtype) for name in names)

    largest = max((size(names) for names in blocks), default=0)
    work = batch_tokens * (width * 64 + min(vocabulary, 1 << 16) * 2)
    token = 3 * width * dtype.itemsize  # a hidden state, what the head gets, what else is kept
    weights = size(list(checkpoint.tensors))
    return Need(weights, 2 * largest, work, token, batch_tokens, tokens)


def _bytes_in_memory(checkpoint: "Checkpoint", name: str, dtype: "torch.dtype") -> int:
    place = checkpoint.tensors[name]
    if place.dtype.is_floating_point and place.dtype.itemsize > 1:
        return place.size // place.dtype.itemsize * dtype.itemsize
    return place.size


def free_bytes() -> int:
    """Memory that this process may still take: of the machine, its cgroup and its own limit."""
    free = [psutil.virtual_memory().available]
    for limit, usage in CGROUP_FILES:
        if Path(limit).is_file() and (text := Path(limit).read_text().strip()) != "max":
            free.append(int(text) - int(Path(usage).read_text()))
    soft, _ = resource.getrlimit(resource.RLIMIT_DATA)
    if soft != resource.RLIM_INFINITY:
        free.append(soft - psutil.Process().memory_info().data)
    return max(0, min(free))


def choose_engine(need: Need, wanted: str, free: int) -> Plan:
    """Choose how to run: `wanted`, or with "auto" resident where it fits, else streamed.

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
        return Plan(RESIDENT, need.batch_tokens, f"resident: {why} ({numbers})")
    if need.streamed > free:
        raise WillNotFit(
            f"not even one block at a time fits ({numbers}): a block in use and one being read are "
            f"{need.two_blocks / GIB:.2f} GiB, a batch of {need.batch_tokens} tokens "
            f"{(need.work + need.token * need.batch_tokens) / GIB:.2f} GiB; lower batch_rows, or "
            f"free {(need.streamed - free) / GIB:.1f} GiB"
        )
    together = need.tokens_at_once(free)
    passes = -(-need.tokens // together)
    return Plan(
        STREAMED, together,
        f"streamed: a block at a time, {passes} pass{'es' * (passes > 1)} of {together} tokens "
        f"({numbers})",
    )  # fmt: skip
