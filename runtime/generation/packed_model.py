"""A model like Llama as a few packed matrices and a short forward, made for decoding on a CPU.

Like Llama: blocks of RMSNorm, attention by q, k, v, o with rotary positions, RMSNorm, gated MLP;
biases or not, and every block may have its own number of heads and neurons. Adapters that are not
in the weights can be added to some rows (runtime/adapters/rows.py). Parts are found by
their names in the block, never by the model's family, and the whole is tried against the model's
own forward on a few tokens: what has another formula somewhere (Gemma's norms, Granite's factors)
gives other logits and is refused, as are sliding windows and positions that depend on the length.

half_weights: a float32 model's matrices are rounded to float16, the arithmetic stays in float32
(products.py). The log-probabilities of answers are those of the rounded weights, which did draw the
tokens. Weights published in float16 lose nothing; of a SmolLM2 whose weights are others, log-
probabilities were 0.002 from the model's own on average, 0.009 at most, and one of four greedy
answers of 48 tokens was another than generate's (benchmarks/generation.py).

Letters: N tokens, D hidden width, H query heads, K key/value heads, C size of a head, V vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, rms_norm
from transformers import PreTrainedModel

from modeling.blocks import Anatomy, dissect, find_blocks
from runtime.adapters.rows import Columns, RowDeltas
from runtime.generation.products import Part, Product, pack, packing_for

ROLES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
STEADY_ROTARY = ("default", "linear", "llama3", "yarn")  # the same at every length
PROBE = [5, 3, 8, 1, 9, 2, 7]  # token ids; only their variety matters
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 5e-2}

# (block index, q (N, H, C), k (N, K, C), v (N, K, C)) -> (N, H, C)
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class NotPackable(Exception):
    """Why a model is not decoded from packed weights."""


@dataclass(frozen=True)
class Norm:
    """An RMSNorm."""

    weight: Tensor  # (D,)
    epsilon: float

    def __call__(self, x: Tensor) -> Tensor:
        """Of (N, D)."""
        return rms_norm(x, self.weight.shape, self.weight, self.epsilon)


@dataclass(frozen=True)
class PackedLayers:
    """Linear layers with the same input, as one product."""

    product: Product
    columns: Columns

    def __call__(self, x: Tensor, deltas: RowDeltas | None) -> Tensor:
        """Their results side by side, with what adapters add to some rows: (N, D) -> (N, F)."""
        y = self.product(x)
        if deltas is not None:
            deltas.add_to(y, x, self.columns)
        return y


@dataclass(frozen=True)
class PackedBlock:
    """What a block computes with."""

    norms: tuple[Norm, Norm]
    qkv: PackedLayers
    o: PackedLayers
    gate_up: PackedLayers
    down: PackedLayers
    activation: nn.Module
    heads: int  # H
    kv_heads: int  # K

    @property
    def layers(self) -> Iterator[str]:
        """The names of its linear layers."""
        for packed in (self.qkv, self.o, self.gate_up, self.down):
            yield from (name for name, _, _ in packed.columns)


@dataclass(frozen=True)
class Stream:
    """Tokens on their way through the blocks."""

    hidden: Tensor  # (N, D)
    cos: Tensor  # (N, 1, C), of their positions
    signed_sin: Tensor


class PackedModel:
    """A model's packed weights, and its forward but for attention, which knows of rows."""

    def __init__(self, model: PreTrainedModel, half_weights: bool) -> None:
        """Pack a model. Raises NotPackable, saying why, for one that is not like Llama."""
        if model.device.type != "cpu":
            raise NotPackable(f"packed weights are for a CPU, and the model is on {model.device}")
        hooked = [name for name, module in model.named_modules() if module._forward_hooks]
        if hooked:
            raise NotPackable(f"'{hooked[0]}' has a hook, which packed weights would pass by")
        self._model = model
        self._anatomy = _anatomy(model)
        self._rotary = _rotary_of(model)
        self._packing = packing_for(model.dtype, half_weights)
        self._refuse_windows()
        with torch.no_grad():
            self._pack("plain")
            self._try()
            self.refresh()

    @property
    def description(self) -> str:
        """What the weights are packed as, in words."""
        return f"from weights packed for a CPU ({self._packing}, {self._model.dtype} arithmetic)"

    @property
    def dtype(self) -> torch.dtype:
        """The type of hidden states, keys and values."""
        return self._model.dtype

    @torch.no_grad()
    def refresh(self) -> None:
        """Pack the matrices as they are now; the embedding and the norms are the model's own."""
        self._pack(self._packing)

    def forward(
        self, tokens: Tensor, positions: Tensor, attend: Attend, deltas: RowDeltas | None = None
    ) -> Tensor:
        """Hidden states behind the last block: (N,), (N,) -> (N, D). deltas: of these N tokens."""
        stream = self.begin(tokens, positions)
        return self.through(range(len(self.blocks)), stream, attend, deltas).hidden

    def begin(self, tokens: Tensor, positions: Tensor) -> Stream:
        """Tokens (N,) and their positions (N,), in front of the first block."""
        x = embedding(tokens, self._embedding)
        return Stream(x, *self._angles(positions, x))

    def through(
        self, blocks: range, stream: Stream, attend: Attend, deltas: RowDeltas | None = None
    ) -> Stream:
        """The stream behind the last of some blocks, from in front of the first of them."""
        x = stream.hidden
        for index in blocks:
            block = self.blocks[index]
            rotated = block.heads + block.kv_heads
            qkv = block.qkv(block.norms[0](x), deltas).unflatten(-1, (-1, self.head_size))
            qk = rotate(qkv[:, :rotated], stream.cos, stream.signed_sin)
            mixed = attend(index, qk[:, : block.heads], qk[:, block.heads :], qkv[:, rotated:])
            x = x + block.o(mixed.flatten(1), deltas)
            gate, up = block.gate_up(block.norms[1](x), deltas).chunk(2, -1)
            x = x + block.down(block.activation(gate).mul_(up), deltas)
        return replace(stream, hidden=x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, D) -> (N, V)."""
        return self._head(self._norm(hidden))

    def _pack(self, packing: str) -> None:
        """Take the model's weights, one block after the other, so that no second copy is whole."""
        anatomy = self._anatomy
        self._embedding = self._model.get_input_embeddings().weight.detach()
        config = self._model.config.get_text_config()
        heads = config.num_attention_heads
        self.head_size: int = getattr(config, "head_dim", None) or config.hidden_size // heads
        self._norm = _norm(anatomy.norm)
        self._head = pack([_part(anatomy.head)], packing)
        kept = getattr(self, "blocks", [None] * len(anatomy.blocks))
        self.blocks: list[PackedBlock] = kept
        place, _ = find_blocks(self._model)
        for index, block in enumerate(anatomy.blocks):
            kept[index] = _pack_block(block, f"{place}.{index}", self.head_size, packing)

    def _refuse_windows(self) -> None:
        config = self._model.config.get_text_config()
        window = getattr(config, "sliding_window", None)
        context = getattr(config, "max_position_embeddings", None)
        if window is not None and (context is None or window < context):
            raise NotPackable(f"attention sees a window of {window} tokens")

    def _angles(self, positions: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines of positions (N,): (N, 1, C) each."""
        cos, sin = self._rotary(x, positions[None])
        half = sin.shape[-1] // 2
        signed = torch.cat((-sin[..., :half], sin[..., half:]), -1)
        return cos[0, :, None], signed[0, :, None]

    def _try(self) -> None:
        """Raises NotPackable unless a few tokens get the model's own logits."""
        tokens = torch.tensor(PROBE).remainder(len(self._embedding))
        hidden = self.forward(tokens, torch.arange(len(tokens)), _causal)
        training = self._model.training
        own = self._model.eval()(tokens[None], use_cache=False).logits[0].float()
        self._model.train(training)
        error = (self.logits(hidden).float() - own).norm() / own.norm()
        if not error <= TOLERANCES.get(self.dtype, 0.0):
            raise NotPackable(
                f"{type(self._model).__name__} computes something else than a Llama does: on "
                f"{len(PROBE)} tokens the logits are {error:.1g} apart"
            )


def rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Turn each head (N, H, C) by its position: dimension i with i + C/2 (Su 2021, as in Llama)."""
    half = x.shape[-1] // 2
    swapped = torch.cat((x[..., half:], x[..., :half]), -1)
    return torch.addcmul(x * cos, swapped, signed_sin)


def _causal(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention among the tokens of one prompt."""
    q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
    attention = torch.nn.functional.scaled_dot_product_attention
    return attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


def _anatomy(model: PreTrainedModel) -> Anatomy:
    try:
        return dissect(model)
    except ValueError as error:
        raise NotPackable(str(error)) from error


def _rotary_of(model: PreTrainedModel) -> nn.Module:
    """The module that gives cosines and sines of positions."""
    found = [m for m in model.get_decoder().children() if "Rotary" in type(m).__name__]
    if len(found) != 1:
        raise NotPackable(f"{type(model).__name__} has {len(found)} rotary embeddings, not one")
    kind = getattr(found[0], "rope_type", "unknown")
    if kind not in STEADY_ROTARY:
        raise NotPackable(f"rotary positions are of the type '{kind}'")
    return found[0]


def _pack_block(block: nn.Module, place: str, head_size: int, packing: str) -> PackedBlock:
    """Pack a block of this name. Raises NotPackable, naming what is missing or too many."""
    full = {name.rpartition(".")[2]: f"{place}.{name}" for name, _ in block.named_modules()}
    named = {name.rpartition(".")[2]: module for name, module in block.named_modules()}
    if missing := [role for role in ROLES if role not in named]:
        raise NotPackable(f"{type(block).__name__} has no {', '.join(missing)}")
    norms = [m for m in block.children() if type(m).__name__.endswith("RMSNorm")]
    if len(norms) != 2:
        raise NotPackable(f"{type(block).__name__} has {len(norms)} RMSNorms, not two")
    parts = {role: _part(named[role]) for role in ROLES}
    sizes = {role: len(weight) for role, (weight, _) in parts.items()}
    activation = getattr(named.get("mlp"), "act_fn", None)
    if activation is None:
        raise NotPackable(f"{type(block).__name__} has no mlp with an act_fn")

    def together(*roles: str) -> PackedLayers:
        ends = list(accumulate(sizes[role] for role in roles))
        columns = [(full[r], end - sizes[r], end) for r, end in zip(roles, ends, strict=True)]
        return PackedLayers(pack([parts[role] for role in roles], packing), tuple(columns))

    return PackedBlock(
        norms=(_norm(norms[0]), _norm(norms[1])),
        qkv=together("q_proj", "k_proj", "v_proj"),
        o=together("o_proj"),
        gate_up=together("gate_proj", "up_proj"),
        down=together("down_proj"),
        activation=activation,
        heads=sizes["q_proj"] // head_size,
        kv_heads=sizes["k_proj"] // head_size,
    )


def _part(module: nn.Module) -> Part:
    """The weight and bias of a linear layer, an adapter's among them if it is merged.

    Raises ValueError for an adapter (PEFT's) that is not: its product would be left out.
    """
    if hasattr(module, "get_base_layer"):
        if not module.merged and not module.disable_adapters:
            raise ValueError(
                f"adapters {', '.join(module.active_adapters)} are not merged into the weights; "
                "call merge_adapter() before, and unmerge_adapter() behind"
            )
        module = module.get_base_layer()
    if not isinstance(module, nn.Linear):
        raise NotPackable(f"{type(module).__name__} is no linear layer")
    return module.weight, module.bias


def _norm(norm: nn.Module) -> Norm:
    epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    weight = getattr(norm, "weight", None)
    if weight is None or epsilon is None:
        raise NotPackable(f"{type(norm).__name__} is no RMSNorm with a weight and an epsilon")
    return Norm(weight.detach(), epsilon)
