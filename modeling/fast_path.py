"""Train a model's blocks on a CPU with the kernels of modeling/cpu_kernels.py, within a context.

    with fast_path(model, print):
        ...                        # forward and backward
    # the model is stock transformers again

Parts are found by what they are made of, and each RMSNorm and MLP is tried on a few numbers against
its own forward first, so that one of another kind (Gemma's 1 + weight, another activation, a bias)
keeps its own code. What keeps it is said once, by name. What is used is a matter of types alone,
never of a timing, so that a machine computes the same today and tomorrow:

    RMSNorm, gated MLP   every type
    layers with adapters every type, where the layer itself is frozen (modeling/adapted_kernels.py)
    Mamba's scan         every type (modeling/scan.py)
    attention            bfloat16, rows of up to MOST_TOKENS; torch's flash kernel is as fast in
                         float32, and faster on long rows

The results are the model's own to rounding, not to the bit; in bfloat16, attention's scores are
rounded as in transformers' eager attention.

Measured, forward and backward at SmolLM2's shape: on an AVX2 processor in float32, where matrix
products are over eight tenths of a step, RMSNorm 1.3 times as fast as its own code, the MLP alike
in time and with half of what it keeps, attention 0.9 times. On one with AMX in bfloat16, with
prototypes of these: attention 1.7 to 3.9 times on rows of 112 to 256 tokens, all together 1.3 to
1.5 times.
"""

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from modeling.adapted_kernels import AdaptedLayer, adapted_layer, adapted_linear, adapted_mlp
from modeling.attention import attention_by, configs_of
from modeling.cpu_kernels import causal_attention, gated_mlp, rms_norm
from modeling.scan import fast_scan, mixers_of

ATTENTION = "nanofoundry_causal"  # the name in transformers' registry
MOST_TOKENS = 256  # a row, where plain products still beat the flash kernel
MLP = ("gate_proj", "up_proj", "down_proj")
HARMLESS = ("position_ids", "use_cache", "cache_position", "sliding_window")  # the mask has them
PROBE_ROWS, TOLERANCE = 4, 1e-5

Say = Callable[[str], None]
Forward = Callable[[Tensor], Tensor]


@contextlib.contextmanager
def fast_path(model: PreTrainedModel, say: Say) -> Iterator[None]:
    """Put the kernels in the places they fit, and take them out again at the end.

    say: is told, once for each kind of part, what keeps the model's own code and why.
    """
    if model.device.type != "cpu":
        say(f"fast path: made for a CPU; on {model.device} every part keeps its own code")
        yield
        return
    told: set[str] = set()

    def say_once(what: str) -> None:
        if what not in told:
            told.add(what)
            say(f"fast path: {what}; it keeps its own code")

    patched: list[nn.Module] = []
    try:
        for module in model.modules():
            if (forward := _replacement(module, say_once)) is not None:
                module.forward = forward
                patched.append(module)
        with _attention(model, say_once), fast_scan(model) if mixers_of(model) else nullcontext():
            yield
    finally:
        for module in patched:
            del module.forward


def _replacement(module: nn.Module, say: Say) -> Forward | None:
    """A forward of ours for a module that it fits; None for every other."""
    if type(module).__name__.endswith("RMSNorm"):
        find = _norm_forward
    elif set(MLP) <= dict(module.named_children()).keys():
        find = _mlp_forward
    elif hasattr(module, "lora_A"):
        find = _layer_forward
    else:
        return None
    if "forward" in vars(module):
        say(f"the forward of {type(module).__name__} is replaced already")
        return None
    signature = inspect.signature(module.forward).parameters.values()
    takes_one = (
        sum(parameter.kind is parameter.POSITIONAL_OR_KEYWORD for parameter in signature) == 1
    )
    forward, width = find(module) if takes_one else (None, 0)
    known = find is _layer_forward  # its parts tell all that it computes
    if forward is None or not (known or _agree(module, find, width)):
        say(f"{type(module).__name__} has another formula, activation, bias or input")
        return None
    return forward


def _norm_forward(norm: nn.Module) -> tuple[Forward | None, int]:
    """Our forward of an RMSNorm, and its width; None where its parameters are others."""
    epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    parameters = dict(norm.named_parameters())
    if list(parameters) != ["weight"] or norm.weight.dim() != 1 or epsilon is None:
        return None, 0
    return partial(_run_norm, norm, epsilon), norm.weight.shape[-1]


def _run_norm(norm: nn.Module, epsilon: float, hidden: Tensor) -> Tensor:
    return rms_norm(hidden, norm.weight, epsilon)


def _mlp_forward(mlp: nn.Module) -> tuple[Forward | None, int]:
    """Our forward of a gated MLP, and its width; None unless it is three layers without a bias."""
    layers = [adapted_layer(getattr(mlp, name)) for name in MLP]
    plain = all(layer is not None and layer.bias is None for layer in layers)
    if not plain or {name.partition(".")[0] for name, _ in mlp.named_parameters()} != set(MLP):
        return None, 0
    return partial(_run_mlp, mlp, type(mlp).forward), layers[0].weight.shape[1]


def _run_mlp(mlp: nn.Module, own: Callable, hidden: Tensor) -> Tensor:
    layers = [adapted_layer(getattr(mlp, name)) for name in MLP]  # adapters come and go
    if all(layer is not None and layer.down is None for layer in layers):
        return gated_mlp(hidden, *(layer.weight for layer in layers))
    if not all(_is_frozen(layer, hidden) for layer in layers):
        return own(mlp, hidden)
    return adapted_mlp(hidden, *layers)


def _layer_forward(module: nn.Module) -> tuple[Forward | None, int]:
    """Our forward of a linear layer with an adapter, and its input width; None for another kind."""
    layer = adapted_layer(module)
    if layer is None:
        return None, 0
    return partial(_run_layer, module, type(module).forward), layer.weight.shape[1]


def _run_layer(module: nn.Module, own: Callable, hidden: Tensor) -> Tensor:
    layer = adapted_layer(module)
    if not _is_frozen(layer, hidden) or layer.down is None:
        return own(module, hidden)
    return adapted_linear(hidden, layer)


def _is_frozen(layer: AdaptedLayer | None, hidden: Tensor) -> bool:
    """Whether only the adapter of a layer learns, in the type that comes in."""
    if layer is None or layer.weight.requires_grad:
        return False
    return layer.down is None or layer.down.dtype == hidden.dtype


@torch.no_grad()
def _agree(module: nn.Module, find: Callable[[nn.Module], tuple], width: int) -> bool:
    """Whether both forwards give the same on a few numbers, to the rounding of float32.

    Of a copy in float32: bfloat16 rounds the difference between two activations away.
    """
    copied = copy.deepcopy(module).float()
    forward, _ = find(copied)
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(1, PROBE_ROWS, width, generator=generator)
    own, ours = copied(probe), forward(probe)
    return ((own - ours).norm() <= TOLERANCE * own.norm()).item()


# --- attention -------------------------------------------------------------------------------


@contextlib.contextmanager
def _attention(model: PreTrainedModel, say: Say) -> Iterator[None]:
    """Let the model's attention modules call ours, by transformers' own registry."""
    names = {config._attn_implementation for config in configs_of(model)}
    if names != {"sdpa"} or model.dtype != torch.bfloat16:
        if model.dtype == torch.bfloat16:
            say(f"attention is {', '.join(sorted(map(str, names)))}, not sdpa")
        yield
        return
    with attention_by(configs_of(model), ATTENTION, partial(attention_forward, say), sdpa_mask):
        yield


def attention_forward(
    say: Say,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: ours where it is plain and causal, else sdpa's.

    query (B, H, T, C), key and value (B, K, T, C) -> (B, T, H, C). A mask, as of padding or of a
    sliding window shorter than the row, is sdpa's.
    """
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    reasons = {
        "has a mask": attention_mask is not None,
        "is not causal": not causal,
        "has dropout": dropout != 0,
        "has keys of other rows": key.shape[2] != query.shape[2],
        "has values of another width": value.shape[-1] != query.shape[-1],
        f"has rows of more than {MOST_TOKENS} tokens": query.shape[2] > MOST_TOKENS,
        "has " + ", ".join(_extras(others)): bool(_extras(others)),
    }
    for reason, holds in reasons.items():
        if holds:
            say(f"{type(module).__name__} {reason}")
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
                is_causal=is_causal, **others,
            )  # fmt: skip
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return causal_attention(query, key, value, scaling), None


def _extras(others: dict[str, Any]) -> list[str]:
    """The names of what else attention was given: a softcap, sinks, a bias of positions."""
    return [
        name
        for name, value in others.items()
        if name not in HARMLESS and value is not None and value is not False
    ]
