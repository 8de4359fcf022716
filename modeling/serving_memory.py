"""How much memory serving a model takes, from its files' headers alone, before anything is loaded.

    need = serving_need(folder, dtype, context=2048, rows=4, adapters=folders, packing="float16")
    require_tier(need, lookup("tiers", "core"))     # raises WillNotFit: the numbers, and what fits
    require_free(need)

A process is at its highest either while the file is still mapped and the weights are made from it,
or later, while it reads prompts with everything else in place; `ServingNeed.total` is the larger of
the two. What runtime/generation/ does is counted as it does it: each matrix once more where it is
packed, keys and values of prompts to the token and those of answers in room that doubles.

Not counted: tools, which are processes of their own, and what else the same process does.
Measured beside the peak of real processes: benchmarks/serving_memory.py.

Letters: D hidden width, H query heads, K key/value heads, C size of a head, V vocabulary.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from transformers import AutoConfig

from modeling.checkpoint import Checkpoint, read_checkpoint, read_header
from modeling.memory import GIB, WillNotFit, bytes_in_memory, free_bytes
from modeling.served_sizes import HEAD, activations_a_token, packed_bytes, values_a_token
from registry.records import Tier

FIRST_ROOM = 64  # tokens behind a prompt, and how many of prompts are read together: as in
PREFILLED_AT_ONCE = 4096  # runtime/generation/packed_session.py (a test holds them together)
INSERTED_AT_ONCE = 16  # tokens of a row in a step at most, likewise
LOGITS_COPIES = 6  # of rows x V float32 numbers while a token is drawn: runtime/generation/drawing
SCORES_COPIES = 3  # of the attention's scores in a step
FRAGMENTED = 0.25  # of the work space, which malloc has free but scattered (measured: 0.1 to 0.5)
LIBRARIES = 64 << 20  # what imports and kernels take at their first use, and small allocations
TOKENIZER_TIMES = 13  # of the bytes of tokenizer.json (measured: 45.6 MiB of 3.4)


@dataclass(frozen=True)
class ServedModel:
    """What a model's files say of how it will lie in memory."""

    folder: Path
    dtype: torch.dtype
    weights: int  # bytes of all tensors in the type that they are computed in, a tied one once
    file: int  # bytes that are mapped while it is loaded
    packed: int  # bytes of the second copy of its matrices; 0 without one
    tokenizer: int  # bytes of the opened tokenizer
    token: int  # bytes of the keys and values of one token
    activations: int  # bytes of a token while its prompt is read
    heads: int  # H
    vocabulary: int  # V
    longest: int | None  # the model's own context, tokens
    shares_memory: bool  # with the process, and not on a GPU of its own

    @property
    def is_packed(self) -> bool:
        """Whether it is decoded from packed weights, with keys and values kept in place."""
        return self.packed > 0


@dataclass(frozen=True)
class ServedAdapter:
    """What a LoRA adapter's file says of it: bytes in the type that is computed in."""

    name: str
    rank: int
    size: int


@dataclass(frozen=True)
class ServingNeed:
    """What it takes to serve a model, by part, in bytes.

    context: tokens of a prompt and its answer.  answer_tokens: how many of these are the answer's.
    rows: answers at once, each of a prompt of its own.  before: what the process has taken already.
    """

    model: ServedModel
    context: int
    answer_tokens: int
    rows: int
    adapters: tuple[ServedAdapter, ...]
    before: int

    @property
    def prompt_tokens(self) -> int:
        """What is left of the context for the prompt."""
        return max(1, self.context - self.answer_tokens)

    @property
    def keys_and_values(self) -> int:
        """Of all rows, at their full length."""
        if not self.model.is_packed:
            return self.rows * self.context * self.model.token
        room = FIRST_ROOM
        while room < self.answer_tokens - 1:  # the last token is never fed
            room *= 2
        return self.rows * (self.prompt_tokens + room) * self.model.token

    @property
    def work(self) -> int:
        """The most that comes and goes: reading prompts, or a step and its logits."""
        prompt = self.prompt_tokens
        together = self.rows * prompt
        if self.model.is_packed:  # in parts of whole prompts
            together = min(together, max(prompt, PREFILLED_AT_ONCE // prompt * prompt))
        scores = self.rows * INSERTED_AT_ONCE * self.model.heads * self.context * 4
        step = SCORES_COPIES * scores + LOGITS_COPIES * self.rows * self.model.vocabulary * 4
        return int((1 + FRAGMENTED) * max(together * self.model.activations, step))

    @property
    def adapted(self) -> int:
        """Of all adapters."""
        return sum(adapter.size for adapter in self.adapters)

    @property
    def process(self) -> int:
        """Of the libraries and the tokenizer, on the CPU."""
        return LIBRARIES + self.model.tokenizer if self.model.shares_memory else 0

    @property
    def serving(self) -> int:
        """Of what is there beside the weights when prompts are read."""
        return self.model.packed + self.keys_and_values + self.work + self.adapted

    @property
    def total(self) -> int:
        """The most that the process has at any time."""
        loading = self.model.file if self.model.shares_memory else 0
        return self.before + self.process + self.model.weights + max(loading, self.serving)

    def table(self) -> str:
        """The parts in words, a line each."""
        lines = {
            "taken before": self.before,
            "libraries, tokenizer": self.process,
            f"weights, {self.model.dtype}": self.model.weights,
            "packed copy of the matrices": self.model.packed,
            f"keys and values, {self.rows} x {self.context} tokens": self.keys_and_values,
            "work space": self.work,
            f"adapters, {len(self.adapters)}": self.adapted,
            "at the most": self.total,
        }
        return "\n".join(f"{what:<40}{size / GIB:>8.3f} GiB" for what, size in lines.items())


def serving_need(
    folder: Path, dtype: torch.dtype, *, context: int, answer_tokens: int, rows: int,
    adapters: Sequence[Path] = (), packing: str | None = None, device: str = "cpu",
) -> ServingNeed:  # fmt: skip
    """Plan the serving of a model, loading nothing.

    packing: how its matrices are packed (runtime/generation/products.py: packing_for), None for
    transformers' own path, as on a GPU.

    Raises BadCheckpoint for files that cannot be read, ValueError for sizes that mean nothing and
    for a model without keys and values.
    """
    for name, value in (("context", context), ("answer_tokens", answer_tokens), ("rows", rows)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be 1 or more")
    where = torch.device(device)
    if where.type != "cpu" and packing is not None:
        raise ValueError(f"packing is '{packing}' on {where}; weights are packed on a CPU alone")
    model = served_model(folder, dtype, packing, where.type == "cpu")
    served = tuple(served_adapter(adapter, dtype) for adapter in adapters)
    return ServingNeed(model, context, answer_tokens, rows, served, taken_bytes(where))


def served_model(
    folder: Path, dtype: torch.dtype, packing: str | None, shares_memory: bool
) -> ServedModel:
    """Read a model's headers and config. Raises BadCheckpoint and ValueError, as serving_need."""
    checkpoint = read_checkpoint(folder)
    config = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
    shapes = {name: tuple(place.shape) for name, place in checkpoint.tensors.items()}
    tied = bool(config.tie_word_embeddings)
    held = [name for name in shapes if not (tied and name.endswith(HEAD))]
    packed = packed_bytes(shapes, dtype, packing)
    tokenizer = folder / "tokenizer.json"
    return ServedModel(
        folder=folder,
        dtype=dtype,
        weights=sum(bytes_in_memory(checkpoint, name, dtype) for name in held),
        file=sum(file.stat().st_size for file in {p.file for p in checkpoint.tensors.values()}),
        packed=packed,
        tokenizer=TOKENIZER_TIMES * tokenizer.stat().st_size if tokenizer.is_file() else 0,
        token=values_a_token(shapes, config) * dtype.itemsize,
        activations=activations_a_token(shapes, config, packed > 0) * dtype.itemsize,
        heads=config.num_attention_heads,
        vocabulary=config.vocab_size,
        longest=getattr(config, "max_position_embeddings", None),
        shares_memory=shares_memory,
    )


def served_adapter(folder: Path, dtype: torch.dtype) -> ServedAdapter:
    """Read the header of a PEFT folder. Raises FileNotFoundError, BadCheckpoint."""
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no adapter ({file.name} is missing)")
    checkpoint = Checkpoint(folder, read_header(file))
    ranks = [place.shape[0] for name, place in checkpoint.tensors.items() if ".lora_A." in name]
    size = sum(bytes_in_memory(checkpoint, name, dtype) for name in checkpoint.tensors)
    return ServedAdapter(folder.name, max(ranks, default=0), size)


def taken_bytes(device: torch.device) -> int:
    """What this process holds now: resident memory, or on a GPU what torch has given out."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process(os.getpid()).memory_info().rss


def require_tier(need: ServingNeed, tier: Tier) -> ServingNeed:
    """The need at the tier's context (the model's own, where that is shorter), if it may be served.

    Raises WillNotFit, before anything is loaded, for an adapter of too high a rank and for more
    bytes than the tier has.
    """
    for adapter in need.adapters:
        if adapter.rank > tier.max_rank:
            raise WillNotFit(
                f"adapter '{adapter.name}' has rank {adapter.rank}; tier '{tier.name}' allows "
                f"{tier.max_rank} at most: train it with a lower rank, or serve it in a higher tier"
            )
    need = replace(need, context=min(tier.context, need.model.longest or tier.context))
    _require(need, tier.memory_gb * 10**9, f"tier '{tier.name}' has")
    return need


def require_free(need: ServingNeed, free: int | None = None) -> ServingNeed:
    """The need, if there is memory for it.  free: what the process may still take; None asks.

    Raises WillNotFit, before anything is loaded.
    """
    if free is None:
        device = torch.device("cpu" if need.model.shares_memory else "cuda")
        free = free_bytes(device, need.model.file if need.model.shares_memory else 0)
    _require(need, need.before + free, "this machine has, with what the process holds already,")
    return need


def _require(need: ServingNeed, budget: int, whose: str) -> None:
    if need.total > budget:
        raise WillNotFit(
            f"serving {need.model.folder.name} with {_request(need)} takes {need.total / GIB:.3f} "
            f"GiB at the most; {whose} {budget / GIB:.3f} GiB. {what_fits(need, budget)}\n"
            f"{need.table()}"
        )


def what_fits(need: ServingNeed, budget: int) -> str:
    """A sentence: the longest context, the most rows, how many of the adapters fit, each alone."""

    def most(highest: int, changed: Callable[[int], ServingNeed], lowest: int = 1) -> int:
        """The largest number up to `highest` that fits; below `lowest` when none does."""
        low, high = lowest - 1, highest
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if changed(middle).total <= budget else (low, middle - 1)
        return low

    shortest = need.answer_tokens + 1
    context = most(need.context, lambda n: replace(need, context=n), shortest)
    rows = most(need.rows, lambda n: replace(need, rows=n))
    count = most(len(need.adapters), lambda n: replace(need, adapters=need.adapters[:n]), 0)
    fits = [f"a context of at most {context} tokens"] * (context >= shortest)
    fits += [f"at most {rows} row{'s' * (rows > 1)} at once"] * (rows >= 1)
    fits += [f"the first {count} of {len(need.adapters)} adapters"] * (count >= 0)
    if fits:
        return f"What would fit: {', or '.join(fits)}, the rest as asked."
    least = replace(need, context=min(need.context, shortest), rows=1, adapters=())
    if least.total <= budget:
        return "What would fit: no single change; lower context, rows and adapters together."
    return (
        f"Nothing would fit: one row of {least.context} tokens without adapters takes "
        f"{least.total / GIB:.3f} GiB; take a smaller model."
    )


def _request(need: ServingNeed) -> str:
    count = len(need.adapters)
    return (
        f"{need.rows} row{'s' * (need.rows > 1)} of {need.context} tokens and {count} "
        f"adapter{'s' * (count != 1)}"
    )
