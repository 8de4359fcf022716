"""The short causal convolution of Mamba with its SiLU, for training on a CPU.

    pre_t = bias + sum_k weight_k x_{t - K + 1 + k}        y_t = silu(pre_t)

Each channel is filtered by itself, with K = 4 taps: as shifted multiply-adds over (B, L, D), the
order in which the projection before it writes, this takes K trips over the values. torch's grouped
convolution wants (B, D, L) and rearranges on the way in and out, three times as long backward.
Only the input is kept; `pre` is made again for the backward pass.

Letters: B rows, L tokens, D channels, K taps.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu


def causal_conv1d(
    hidden_states: Tensor,  # (B, D, L)
    weight: Tensor,  # (D, K)
    bias: Tensor | None = None,  # (D,)
    activation: str | None = None,
    **_: object,
) -> Tensor:
    """What transformers' causal_conv1d_fn gives, (B, D, L).

    Raises ValueError for another activation than SiLU.
    """
    if activation not in ("silu", "swish"):
        raise ValueError(f"causal_conv1d is made for silu, not for the activation '{activation}'")
    mixed = _ConvSilu.apply(hidden_states.mT.to(weight.dtype), weight, bias)
    return mixed.mT.to(hidden_states.dtype)


class _ConvSilu(torch.autograd.Function):
    """x (B, L, D), weight (D, K), bias (D,) or None -> (B, L, D)."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight, bias)
        pre = _filtered(x, weight, bias)
        return silu(pre, inplace=True)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, bias = ctx.saved_tensors
        g = torch.ops.aten.silu_backward(dy.contiguous(), _filtered(x, weight, bias))
        taps, tokens = weight.shape[1], x.shape[1]
        dx, dweight, products = g * weight[:, -1], torch.zeros_like(weight), torch.empty_like(g)
        for tap in range(max(0, taps - tokens), taps):
            late = taps - 1 - tap  # tokens between a value and what it goes into
            end = tokens - late
            torch.mul(g[:, late:], x[:, :end], out=products[:, :end])
            dweight[:, tap] = products[:, :end].sum((0, 1))
            if late:
                dx[:, :end].addcmul_(g[:, late:], weight[:, tap])
        return dx, dweight, None if bias is None else g.sum((0, 1))


def _filtered(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    pre = x * weight[:, -1] if bias is None else torch.addcmul(bias, x, weight[:, -1])
    for late in range(1, min(weight.shape[1], x.shape[1])):
        pre[:, late:].addcmul_(x[:, :-late], weight[:, -1 - late])
    return pre
