"""Find the blocks of any causal language model, and run them one by one with the model's own code.

Structure is found, not listed by family: the block list is the one ModuleList in the text decoder
that is as long as the config says. How a block must be called (masks, rotary embeddings, positions)
is not rebuilt here but captured: one forward in which every block is replaced by a stub that
records its call ("capture and replay", the catcher of GPTQ, Frantar 2022, for every block at once).

Letters: B rows, T tokens a row, D hidden width, V vocabulary.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Anatomy:
    """The parts of a causal language model: blocks, the norm behind them, the output head."""

    blocks: nn.ModuleList
    norm: nn.Module
    head: nn.Linear

    def normed(self, hidden: Tensor) -> Tensor:
        """What the head gets: the final norm of (..., D), in the head's own type."""
        return self.norm(hidden).to(self.head.weight.dtype)


@dataclass(frozen=True)
class BlockCalls:
    """One batch as the blocks see it: the first block's input and each block's other arguments."""

    hidden: Tensor  # (B, T, D)
    arguments: list[tuple[tuple, dict[str, Any]]]


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Find the block list and its name. Raises ValueError, saying what was found, when unclear.

    Only lists in the text decoder count: a vision tower may be just as deep.
    """
    text = model.config.get_text_config()
    count = getattr(text, "num_hidden_layers", None)
    decoder = {id(module) for module in model.get_decoder().modules()}
    every = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    within = {n: m for n, m in every.items() if id(m) in decoder} or every
    lists = {name: module for name, module in within.items() if len(module) == count}
    if len(lists) > 1:  # the decoder holds the tower
        lists = {
            n: m for n, m in lists.items() if type(_config_of(model, n)) is type(text)
        } or lists
    if len(lists) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(lists)} lists of {count} modules "
            f"({', '.join(lists) or 'none'}); exactly one is needed to know its blocks"
        )
    return next(iter(lists.items()))


def _config_of(model: PreTrainedModel, name: str) -> PreTrainedConfig:
    """The configuration of the innermost module around a name that has one."""
    while name:
        name = name.rpartition(".")[0]
        config = getattr(model.get_submodule(name), "config", None)
        if isinstance(config, PreTrainedConfig):
            return config
    return model.config


def called_linear_layers(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers inside blocks that a forward pass calls as modules.

    The weight of another, as Mamba's dt_proj in transformers, is used as a bare matrix.
    """
    place, blocks = find_blocks(model)
    called: set[str] = set()
    hooks = [
        module.register_forward_pre_hook(lambda _m, _i, name=name: called.add(name))
        for name, module in blocks.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        with torch.no_grad():
            model(torch.zeros(1, 2, dtype=torch.int64, device=model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [f"{place}.{name}" for name, _ in blocks.named_modules() if name in called]


def find_units(model: PreTrainedModel) -> list[nn.Module]:
    """What a model is streamed by: its blocks, or the members of all its outermost lists where the
    blocks are in several, as in a model of encoder and decoder."""
    if not model.config.is_encoder_decoder:
        with contextlib.suppress(ValueError):
            return list(find_blocks(model)[1])
    units: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList):
                units.extend(member for member in child if any(True for _ in member.parameters()))
            else:
                visit(child)

    visit(model)
    return units


def dissect(model: PreTrainedModel) -> Anatomy:
    """Find the parts of a model. Raises ValueError, saying what was found, when it is ambiguous."""
    name, blocks = find_blocks(model)
    parent = model.get_submodule(name.rpartition(".")[0])
    norms = [child for child in parent.children() if "norm" in type(child).__name__.lower()]
    if not norms:
        raise ValueError(f"{type(model).__name__} has no norm beside its blocks at '{name}'")
    return Anatomy(blocks, norms[-1], model.get_output_embeddings())


def capture_calls(
    model: PreTrainedModel, input_ids: Tensor, embedding_learns: bool = False
) -> BlockCalls:
    """Record how the model calls each of its blocks on `input_ids` (B, T), running none of them.

    embedding_learns: the first block's input back-propagates to what it was made by.
    """
    calls: list[tuple[Tensor, tuple, dict[str, Any]]] = []

    def record(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append((hidden, args, kwargs))
        return hidden

    blocks = dissect(model).blocks
    learns = embedding_learns and torch.is_grad_enabled()
    with _replaced_forwards(blocks, record), torch.set_grad_enabled(learns):
        model(input_ids, use_cache=False, logits_to_keep=1)
    return BlockCalls(calls[0][0], [(args, kwargs) for _, args, kwargs in calls])


def run_block(block: nn.Module, calls: BlockCalls, index: int, hidden: Tensor) -> Tensor:
    """Run one block as the model itself would call it at `index`: (B, T, D) -> (B, T, D)."""
    args, kwargs = calls.arguments[index]
    output = block(hidden, *args, **kwargs)
    return output[0] if isinstance(output, tuple) else output


def block_outputs(model: PreTrainedModel, input_ids: Tensor) -> Iterator[Tensor]:
    """What each block puts out for `input_ids` (B, T), in order: (B, T, D) each."""
    calls = capture_calls(model, input_ids)
    hidden = calls.hidden
    for index, block in enumerate(dissect(model).blocks):
        hidden = run_block(block, calls, index, hidden)
        yield hidden


def drop_blocks(model: PreTrainedModel, dropped: list[int]) -> None:
    """Take blocks out of a model, in place; what is left is a smaller model of the same class."""
    anatomy = dissect(model)
    if strange := sorted(set(dropped) - set(range(len(anatomy.blocks)))):
        raise ValueError(
            f"blocks {strange} cannot be dropped; there are 0 to {len(anatomy.blocks) - 1}"
        )
    kept = [block for index, block in enumerate(anatomy.blocks) if index not in set(dropped)]
    config = model.config.get_text_config()
    if vars(config).get("layer_types"):  # an attribute in some families, derived in others
        types = config.layer_types
        config.layer_types = [kind for i, kind in enumerate(types) if i not in set(dropped)]
    for position, block in enumerate(kept):
        for module in block.modules():
            if hasattr(module, "layer_idx"):  # its place in the key/value cache
                module.layer_idx = position
    del anatomy.blocks[:]
    anatomy.blocks.extend(kept)
    config.num_hidden_layers = len(kept)


@contextlib.contextmanager
def _replaced_forwards(blocks: nn.ModuleList, forward: Any) -> Iterator[None]:
    """Put a function in the place of every block's forward, and take it away again."""
    try:
        for block in blocks:
            block.forward = forward
        yield
    finally:
        for block in blocks:
            del block.forward
