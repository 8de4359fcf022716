"""Make a causal language model narrower: fewer FFN neurons, attention heads, hidden dimensions.

What is left is a stock model of the same class: every block has the same sizes, the size of a head
stays, and each key/value head keeps equally many query heads (Minitron, Muralidharan 2024, arXiv
2407.14679). The smaller model is built by the model's own code from a smaller configuration, and
filled with those rows and columns that stay.

Structure is found by shape: a block has the matrices q, k, v, o of attention and gate, up, down of
an MLP, and two norms of one weight each. All else is refused by name: experts, state spaces, norms
over all heads. Norms within a head, and biases, are fine.

Letters: D hidden width, H query heads, K key/value heads, S size of a head, F neurons of the MLP.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from modeling.blocks import dissect
from registry.records import Keep

ROLES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Widths:
    """The sizes that all blocks of a model share."""

    hidden: int  # D
    heads: int  # H
    kv_heads: int  # K
    head: int  # S
    ffn: int  # F

    @property
    def group(self) -> int:
        """Query heads of each key/value head."""
        return self.heads // self.kv_heads

    def kept(self, keep: Keep) -> "Widths":
        """The sizes that are left of these. Raises ValueError where they make no stock model."""

        def share(of: int, kept: float) -> int:
            return max(1, round(of * kept))

        kv_heads = share(self.kv_heads, keep.kv_heads)
        heads = kv_heads * share(self.group, keep.heads)
        hidden = share(self.hidden, keep.hidden)
        found = Widths(hidden, heads, kv_heads, self.head, share(self.ffn, keep.ffn))
        if found.hidden % found.heads:
            near = hidden // heads * heads
            raise ValueError(
                f"{hidden} hidden dimensions would be left, and {heads} heads; stock models ask "
                f"for a multiple of the heads: keep {near / self.hidden:.4f} or "
                f"{(near + heads) / self.hidden:.4f} of 'hidden' in registry/students.yaml"
            )
        if found == self:
            raise ValueError(
                f"{keep} keeps all of {self}; lower a share in registry/students.yaml, "
                "or write 'keep: null'"
            )
        return found


@dataclass(frozen=True)
class Parts:
    """The matrices and norms of one block like Llama's."""

    q_proj: nn.Linear  # (H S, D)
    k_proj: nn.Linear  # (K S, D)
    v_proj: nn.Linear  # (K S, D)
    o_proj: nn.Linear  # (D, H S)
    gate_proj: nn.Linear  # (F, D)
    up_proj: nn.Linear  # (F, D)
    down_proj: nn.Linear  # (D, F)
    norms: tuple[nn.Module, nn.Module]  # before attention, before the MLP


@dataclass(frozen=True)
class Kept:
    """Which parts stay, as ascending indices; one tensor a block, where blocks differ.

    Query heads are counted over all groups; they have to be those of the key/value heads that stay.
    """

    hidden: Tensor  # (D',)
    heads: list[Tensor]  # (H',)
    kv_heads: list[Tensor]  # (K',)
    neurons: list[Tensor]  # (F',)

    @classmethod
    def everything(cls, widths: Widths, blocks: int) -> "Kept":
        """Nothing goes."""
        heads, kv_heads, neurons = (
            [torch.arange(size)] * blocks for size in (widths.heads, widths.kv_heads, widths.ffn)
        )
        return cls(torch.arange(widths.hidden), heads, kv_heads, neurons)


def columns(heads: Tensor, size: int) -> Tensor:
    """The columns that belong to some heads: (N,) -> (N S,)."""
    return (heads[:, None] * size + torch.arange(size)).flatten()


def widths_of(model: PreTrainedModel) -> Widths:
    """The sizes of a model. Raises ValueError, naming what does not fit, for one unlike Llama."""
    anatomy, config = dissect(model), model.config.get_text_config()
    parts = parts_of(anatomy.blocks[0])
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    found = Widths(
        hidden=parts.o_proj.out_features,
        heads=heads,
        kv_heads=kv_heads,
        head=parts.q_proj.out_features // heads,
        ffn=parts.down_proj.in_features,
    )
    for number, block in enumerate(anatomy.blocks):
        _require_sizes(parts_of(block), found, f"block {number} of {type(model).__name__}")
        _require_known(block, found)
    return found


def parts_of(block: nn.Module) -> Parts:
    """Find the parts of a block. Raises ValueError, naming what is missing or too many."""
    kind = type(block).__name__
    found: dict[str, list[nn.Linear]] = {role: [] for role in ROLES}
    for name, module in block.named_modules():
        leaf = name.rpartition(".")[2]
        if leaf in found and isinstance(module, nn.Linear):
            found[leaf].append(module)
    strange = [f"{len(modules)} {role}" for role, modules in found.items() if len(modules) != 1]
    if strange:
        raise ValueError(
            f"{kind} has {', '.join(strange)}; only blocks with one matrix each of "
            f"{', '.join(ROLES)} can be made narrower: take a student with 'keep: null'"
        )
    hidden = found["o_proj"][0].out_features
    norms = [m for m in block.modules() if _sizes(m) == {"weight": (hidden,)}]
    if len(norms) != 2:
        raise ValueError(
            f"{kind} has {len(norms)} norms of one weight of size {hidden}, not one before "
            "attention and one before the MLP, and cannot be made narrower: take a student with "
            "'keep: null'"
        )
    return Parts(**{role: modules[0] for role, modules in found.items()}, norms=(*norms,))


def cut(model: PreTrainedModel, kept: Kept) -> PreTrainedModel:
    """A smaller model that has only the parts that stay, with the weights that they have.

    Cutting neurons or heads gives, up to rounding, what zeros in their columns of down_proj and
    o_proj would give. Cutting hidden dimensions changes what the norms divide by.
    """
    widths = widths_of(model)
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    text.hidden_size = len(kept.hidden)
    text.num_attention_heads = len(kept.heads[0])
    text.num_key_value_heads = len(kept.kv_heads[0])
    text.head_dim = widths.head
    text.intermediate_size = len(kept.neurons[0])
    with torch.random.fork_rng(devices=[]):  # its random weights are all overwritten
        smaller = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    picks = {id(parameter): axes for parameter, axes in _cuts(model, kept, widths)}
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        state[name] = tensor.detach()
        for axis, index in enumerate(picks.get(id(tensor), ())):
            if index is not None:
                state[name] = state[name].index_select(axis, index.to(tensor.device))
    smaller.load_state_dict(state)
    smaller.generation_config = copy.deepcopy(model.generation_config)
    return smaller.eval().requires_grad_(False)


def _cuts(
    model: PreTrainedModel, kept: Kept, widths: Widths
) -> Iterator[tuple[nn.Parameter, tuple[Tensor | None, ...]]]:
    """Each parameter that gets smaller, and which indices stay of each of its axes."""
    anatomy, hidden = dissect(model), kept.hidden
    yield anatomy.norm.weight, (hidden,)
    for module in (model.get_input_embeddings(), anatomy.head):
        yield module.weight, (None, hidden)
    for number, block in enumerate(anatomy.blocks):
        parts = parts_of(block)
        heads = columns(kept.heads[number], widths.head)
        kv_heads = columns(kept.kv_heads[number], widths.head)
        neurons = kept.neurons[number]
        for norm in parts.norms:
            yield norm.weight, (hidden,)
        for layer, rows, cols in (
            (parts.q_proj, heads, hidden),
            (parts.k_proj, kv_heads, hidden),
            (parts.v_proj, kv_heads, hidden),
            (parts.o_proj, hidden, heads),
            (parts.gate_proj, neurons, hidden),
            (parts.up_proj, neurons, hidden),
            (parts.down_proj, hidden, neurons),
        ):
            yield layer.weight, (rows, cols)
            if layer.bias is not None:
                yield layer.bias, (rows,)


def _sizes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of a module's own parameters; of a module with others inside none."""
    if next(module.children(), None) is not None:
        return {}
    return {name: tuple(p.shape) for name, p in module.named_parameters()}


def _require_sizes(parts: Parts, widths: Widths, where: str) -> None:
    query, key = widths.heads * widths.head, widths.kv_heads * widths.head
    rows = (query, key, key, widths.hidden, widths.ffn, widths.ffn, widths.hidden)
    cols = (widths.hidden,) * 3 + (query,) + (widths.hidden,) * 2 + (widths.ffn,)
    for role, *expected in zip(ROLES, rows, cols, strict=True):
        found = list(getattr(parts, role).weight.shape)
        if found != expected:
            raise ValueError(
                f"{role} of {where} is {found[0]} x {found[1]}, not {expected[0]} x {expected[1]}; "
                "only a model whose blocks are all alike can be made narrower"
            )


def _require_known(block: nn.Module, widths: Widths) -> None:
    """Refuse a block that has parameters of which it is not known how they would be cut."""
    parts = parts_of(block)
    known = {id(p) for role in ROLES for p in getattr(parts, role).parameters()}
    known |= {id(norm.weight) for norm in parts.norms}
    for name, parameter in block.named_parameters():
        if id(parameter) not in known and tuple(parameter.shape) != (widths.head,):
            raise ValueError(
                f"{type(block).__name__} has '{name}' of {tuple(parameter.shape)}, of which it is "
                "not known how to make it narrower: take a student with 'keep: null'"
            )


def keep_dimensions(model: PreTrainedModel, hidden: Tensor) -> PreTrainedModel:
    """The model with only some dimensions of its residual stream; see `cut`."""
    widths = widths_of(model)
    return cut(model, replace(Kept.everything(widths, len(dissect(model).blocks)), hidden=hidden))
