"""Open a teacher of any size, and take batches through it.

The engine is chosen by real bytes (memory.py): all weights in memory, or streamed from disk a block
at a time (streaming.py). Both run the model's own code on the same batches, so the choice changes
no result.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

from modeling.backends import compute_dtype, default_device
from modeling.blocks import find_units
from modeling.checkpoint import read_checkpoint
from modeling.loading import Location, open_model, weights_folder
from modeling.memory import RESIDENT, STREAMED, Plan, choose_engine, free_bytes, need_of
from modeling.packed import open_packed
from modeling.skeleton import OUTSIDE, CannotStream, build_skeleton
from modeling.streaming import Passage
from modeling.weights import Resident, Streamed, Weights, fill_whole, left_on_disk


@dataclass(frozen=True)
class Teacher:
    """A model that is ready to run, however its weights are held."""

    model: PreTrainedModel
    blocks: Sequence[nn.Module]
    weights: Weights
    plan: Plan
    device: torch.device

    def passage(self, batches: Sequence[Tensor]) -> Passage:
        """Prepare batches of token ids (B, T) for their way through the model."""
        inputs: list[Mapping[str, Any]] = [
            {"input_ids": batch.to(self.device), "use_cache": False} for batch in batches
        ]
        return Passage(self.model, self.blocks, self.weights, inputs)

    def close(self) -> None:
        """Give up what is held open; the model cannot be run any more when it was streamed."""
        self.weights.close()


def open_teacher(
    location: Location | Path, engine: str, batch_tokens: int, tokens: int, kept_bytes: int = 0,
    device: torch.device | None = None,
) -> Teacher:  # fmt: skip
    """Open a causal language model with the engine that fits, or the one asked for.

    It computes on the device (the first GPU, else the CPU), in the type that this is fast in.
    batch_tokens: tokens of one batch.  tokens: of all data.  kept_bytes: of memory that a token's
    answers take while it is under way.
    Raises WillNotFit, CannotStream, BadCheckpoint, ValueError for a model that is no causal
    language model or states no width, and FileNotFoundError when it is not there.
    """
    device = device or default_device()
    dtype = compute_dtype(device)
    folder = weights_folder(location)
    config = read_config(folder)
    kind, text = causal_class(folder, config), config.get_text_config()
    stored = read_checkpoint(folder)
    checkpoint, config = open_packed(stored, config, dtype)
    packed = checkpoint is not stored
    fused: Collection[str] = ()
    left: Collection[str] = ()
    try:
        skeleton = build_skeleton(kind, config, checkpoint, dtype, device)
        left = set(left_on_disk(skeleton, checkpoint))
        blocks = [names for part, names in skeleton.parts.items() if part != OUTSIDE]
        fused = skeleton.fused
    except CannotStream as error:
        if packed:
            raise CannotStream(f"{error}, and not be quantised, as {folder} is") from error
        if engine == STREAMED:
            raise
        blocks = [list(checkpoint.tensors)]  # as if it were one block: it is never streamed
    need = need_of(
        checkpoint, blocks, fused, left, dtype, batch_tokens, tokens, text.hidden_size,
        text.vocab_size,
    )  # fmt: skip
    need = replace(need, token=need.token + kept_bytes)
    mapped = 2 * stored.size  # what lies outside blocks, and to ask what the page cache holds
    free = free_bytes(device, mapped)
    plan = choose_engine(need, engine, free, f"{device} in {str(dtype)[6:]}")
    if plan.engine == RESIDENT and packed:
        fill_whole(skeleton, checkpoint)
        return Teacher(skeleton.model, skeleton.blocks, Resident(skeleton.model), plan, device)
    if plan.engine == RESIDENT:
        model = open_model(folder, device)
        return Teacher(model, find_units(model), Resident(model), plan, device)
    weights = Streamed(skeleton, checkpoint, min(tokens, plan.tokens_at_once))
    if weights.routed:
        sentence = f"{plan.sentence}; experts of {len(weights.routed)} blocks as they are routed to"
        plan = replace(plan, sentence=sentence)
    return Teacher(skeleton.model, skeleton.blocks, weights, plan, device)


def causal_class(folder: Path, config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class to open a teacher with. Raises ValueError where there is none, or no width."""
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if kind is None:
        raise ValueError(f"{folder} holds a {config.model_type}, which is no causal language model")
    text = config.get_text_config()
    if missing := [name for name in ("hidden_size", "vocab_size") if not hasattr(text, name)]:
        raise ValueError(f"a {text.model_type} cannot be a teacher: it states no {missing[0]}")
    return kind[0] if isinstance(kind, tuple) else kind


def read_config(folder: Path) -> PreTrainedConfig:
    """A model's configuration. Raises ValueError for one that needs code of its own."""
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except ValueError as error:  # transformers asks for trust_remote_code
        raise ValueError(
            f"{folder} is of a kind that this transformers does not know; code that comes with a "
            f"model is never run. ({str(error).splitlines()[0]})"
        ) from error
