"""Linear layers and gated MLPs that carry a low-rank adapter, with backward passes written out.

    y = x W' + s (x A') B'        W (F, D) frozen, A (R, D) and B (F, R) learnt, s the scale

An adapter of rank 16 is 7 % of the arithmetic of such a layer, but as modules of their own A and B
cost several trips over (N, F) more: a product, its scaling, a sum, and the same backwards. Here the
second product is added to the first where it lies. As in cpu_kernels.py the values are the same
mathematics in another order; modeling/fast_path.py puts them in.

Letters: N tokens, D input and F output width, R rank; in the MLP D is the hidden and F its own.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class AdaptedLayer:
    """A frozen matrix with its adapter; without one, `down` and `up` are None."""

    weight: Tensor  # (F, D)
    bias: Tensor | None = None  # (F,)
    down: Tensor | None = None  # (R, D), A
    up: Tensor | None = None  # (F, R), B
    scale: float = 1.0


def adapted_layer(module: nn.Module) -> AdaptedLayer | None:
    """What a linear layer computes at the moment, with an adapter of PEFT's or bare.

    None for other layers, and where it is more than one plain adapter: with a magnitude (DoRA), a
    bias of its own or dropout. Found by what it is made of: peft need not be there.
    """
    if type(module) is nn.Linear:
        return AdaptedLayer(module.weight, module.bias)
    base = getattr(module, "base_layer", None)
    if not hasattr(module, "lora_A") or type(base) is not nn.Linear:
        return None
    if module.merged != module.disable_adapters:  # in the weight, or out of use
        return AdaptedLayer(base.weight, base.bias)
    active = [name for name in module.active_adapters if name in module.lora_A]
    if module.merged or len(active) != 1:
        return None
    (name,) = active
    factors = module.lora_A[name], module.lora_B[name]
    drops = module.training and getattr(module.lora_dropout[name], "p", 0.0)
    if drops or name in module.lora_variant or any(factor.bias is not None for factor in factors):
        return None
    down, up = (factor.weight for factor in factors)
    return AdaptedLayer(base.weight, base.bias, down, up, module.scaling[name])


def adapted_linear(hidden: Tensor, layer: AdaptedLayer) -> Tensor:
    """The layer's output of (..., D): (..., F)."""
    return _AdaptedLinear.apply(hidden, layer.weight, layer.bias, layer.down, layer.up, layer.scale)


def adapted_mlp(hidden: Tensor, gate: AdaptedLayer, up: AdaptedLayer, down: AdaptedLayer) -> Tensor:
    """down(silu(gate(x)) * up(x)) of (..., D) (SwiGLU, Shazeer 2020); biases are left out.

    Of the four (N, F) tensors in between, two are kept and the others made again.
    """
    layers = (gate, up, down)
    weights = [layer.weight for layer in layers]
    factors = [factor for layer in layers for factor in (layer.down, layer.up)]
    scales = tuple(layer.scale for layer in layers)
    return _AdaptedMLP.apply(hidden, scales, *weights, *factors)


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, a, b, scale):
        x = hidden.reshape(-1, hidden.shape[-1])
        output, low = _forward(x, weight, a, b, scale)
        if bias is not None:
            output += bias
        ctx.save_for_backward(hidden, weight, a, b, low)
        ctx.scale = scale
        return output.view(*hidden.shape[:-1], -1)

    @staticmethod
    def backward(ctx, upstream):
        hidden, weight, a, b, low = ctx.saved_tensors
        x = hidden.reshape(-1, hidden.shape[-1])
        g = upstream.reshape(-1, upstream.shape[-1])
        by_hidden = torch.mm(g, weight) if ctx.needs_input_grad[0] else None
        by_a, by_b = _backward(g, x, low, a, b, ctx.scale, by_hidden)
        by_hidden = by_hidden.view(hidden.shape) if by_hidden is not None else None
        return by_hidden, None, None, by_a, by_b, None


class _AdaptedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, scales, gate, up, down, *factors):
        x = hidden.reshape(-1, hidden.shape[-1])  # (N, D)
        g, u, d = factors[:2], factors[2:4], factors[4:]
        a, low_a = _forward(x, gate, *g, scales[0])  # (N, F)
        b, low_b = _forward(x, up, *u, scales[1])
        output, low = _forward(torch.nn.functional.silu(a).mul_(b), down, *d, scales[2])
        ctx.save_for_backward(hidden, gate, up, down, *factors, a, b, low_a, low_b, low)
        ctx.scales = scales
        return output.view(*hidden.shape[:-1], -1)

    @staticmethod
    def backward(ctx, upstream):
        hidden, gate, up, down, *factors, a, b, low_a, low_b, low = ctx.saved_tensors
        x = hidden.reshape(-1, hidden.shape[-1])
        g = upstream.reshape(-1, upstream.shape[-1])
        silu = torch.nn.functional.silu(a)
        by_inner = torch.mm(g, down)  # (N, F), the gradient of silu(a) * b
        of_down = _backward(g, silu * b, low, *factors[4:], ctx.scales[2], by_inner)
        by_a = torch.ops.aten.silu_backward(by_inner * b, a)
        by_b = by_inner.mul_(silu)
        by_hidden = torch.addmm(torch.mm(by_a, gate), by_b, up)
        of_gate = _backward(by_a, x, low_a, *factors[:2], ctx.scales[0], by_hidden)
        of_up = _backward(by_b, x, low_b, *factors[2:4], ctx.scales[1], by_hidden)
        by_hidden = by_hidden.view(hidden.shape)
        return by_hidden, None, None, None, None, *of_gate, *of_up, *of_down


def _forward(
    x: Tensor, weight: Tensor, a: Tensor | None, b: Tensor | None, scale: float
) -> tuple[Tensor, Tensor | None]:
    """Output (N, F) of x (N, D), and x A' (N, R)."""
    output = torch.mm(x, weight.T)
    if a is None:
        return output, None
    low = torch.mm(x, a.T)
    return output.addmm_(low, b.T, alpha=scale), low


def _backward(
    g: Tensor,
    x: Tensor,
    low: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    scale: float,
    by_x: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of A and B from that of the output (N, F); the adapter's share is added to by_x."""
    if a is None:
        return None, None
    by_low = torch.mm(g, b).mul_(scale)  # (N, R)
    if by_x is not None:
        by_x.addmm_(by_low, a)
    return torch.mm(by_low.T, x), torch.mm(g.T, low).mul_(scale)
