"""Attention, RMSNorm and the gated MLP for training on a CPU, with backward passes written out.

Autograd's own passes over a block are many and small: an RMSNorm alone takes four forward and nine
backward, each of them a trip through the cache. Here a backward pass is derived by hand, keeps less
and makes fewer trips; the matrix products are the same ones. The values are the same mathematics in
another order, so they agree with transformers' own to rounding. modeling/fast_path.py puts them in.

Everything works in the type of its inputs (statistics of float32 or wider), so gradients can be
checked in float64.

Letters: B rows, T tokens a row, H query heads, K key/value heads, C width of a head, D hidden
width, F width of the MLP; N = B T.
"""

import torch
from torch import Tensor


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Causal self-attention: query (B, H, T, C), key and value (B, K, T, C) -> (B, T, H, C).

    H is a multiple of K (grouped queries, Ainslie 2023). The T x T weights are held, so it is meant
    for short rows. Plain batched products: torch's flash kernel for CPUs has a slower backward pass
    up to some 256 tokens.
    """
    return _CausalAttention.apply(query, key, value, scaling)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, scaling):
        batch, heads, tokens, width = query.shape
        groups = heads // key.shape[1]
        q = query.reshape(-1, groups * tokens, width)  # (B K, G T, C): a group's queries share keys
        k, v = (part.reshape(-1, tokens, width) for part in (key, value))  # (B K, T, C)
        later = torch.full((tokens, tokens), float("-inf"), dtype=q.dtype).triu_(1)
        masked = later.repeat(groups, 1).expand(len(q), -1, -1)
        weights = torch.baddbmm(masked, q, k.mT, alpha=scaling)  # (B K, G T, T)
        weights = torch.softmax(weights, -1)
        output = torch.bmm(weights, v)  # (B K, G T, C)
        ctx.save_for_backward(q, k, v, weights, output)
        ctx.scaling, ctx.shapes = scaling, (query.shape, key.shape)
        return output.view(query.shape).transpose(1, 2).contiguous()

    @staticmethod
    def backward(ctx, upstream):
        q, k, v, weights, output = ctx.saved_tensors
        of_query, of_key = ctx.shapes
        g = upstream.transpose(1, 2).reshape(q.shape)
        by_value = torch.bmm(weights.mT, g)
        # d softmax: P * (dP - rowsum(dP * P)), and rowsum(dP * P) = rowsum(dO * O) (Dao 2022)
        by_scores = torch.bmm(g, v.mT)
        by_scores.sub_((g * output).sum(-1, keepdim=True)).mul_(weights)
        by_query = torch.bmm(by_scores, k).mul_(ctx.scaling)
        by_key = torch.bmm(by_scores.mT, q).mul_(ctx.scaling)
        return by_query.view(of_query), by_key.view(of_key), by_value.view(of_key), None


def rms_norm(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """weight * x / sqrt(mean x^2 + epsilon) over the last dimension of (..., D); weight (D,)."""
    return _RMSNorm.apply(hidden, weight, epsilon)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, epsilon):
        x = _wide(hidden.reshape(-1, hidden.shape[-1]))  # (N, D)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()  # (N, 1)
        ctx.save_for_backward(hidden, weight, scale)
        normed = (x * scale).to(hidden.dtype)
        return (weight * normed).view(hidden.shape)  # wider where the weight is

    @staticmethod
    def backward(ctx, upstream):
        hidden, weight, scale = ctx.saved_tensors
        x = _wide(hidden.reshape(-1, hidden.shape[-1]))
        g = _wide(upstream.reshape(x.shape))
        w = weight.to(x.dtype)
        products = g * x  # (N, D): both sums come of it
        by_weight = by_hidden = None
        if ctx.needs_input_grad[1]:
            by_weight = (products.mT @ scale)[:, 0].to(weight.dtype)
        if ctx.needs_input_grad[0]:
            pull = (products @ w)[:, None].mul_(scale.pow(3)).div_(-x.shape[-1])  # (N, 1)
            by_hidden = torch.mul(g, w, out=products).mul_(scale).addcmul_(x, pull)
            by_hidden = by_hidden.to(hidden.dtype).view(hidden.shape)
        return by_hidden, by_weight, None


def gated_mlp(hidden: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """down(silu(gate x) * (up x)) of (..., D) (SwiGLU, Shazeer 2020); gate, up (F, D), down (D, F).

    Of the four (N, F) tensors in between, two are kept and the others made again.
    """
    return _GatedMLP.apply(hidden, gate, up, down)


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, gate, up, down):
        x = hidden.reshape(-1, hidden.shape[-1])  # (N, D)
        a, b = x @ gate.T, x @ up.T  # (N, F)
        ctx.save_for_backward(hidden, gate, up, down, a, b)
        inner = torch.nn.functional.silu(a).mul_(b)
        return (inner @ down.T).view(*hidden.shape[:-1], -1)

    @staticmethod
    def backward(ctx, upstream):
        hidden, gate, up, down, a, b = ctx.saved_tensors
        x = hidden.reshape(-1, hidden.shape[-1])
        g = upstream.reshape(-1, upstream.shape[-1])
        silu = torch.nn.functional.silu(a)
        by_hidden = by_gate = by_up = by_down = None
        if ctx.needs_input_grad[3]:
            by_down = g.T @ (silu * b)
        by_b = g @ down  # (N, F), the gradient of silu(a) * b
        by_a = torch.ops.aten.silu_backward(by_b * b, a)
        by_b.mul_(silu)
        if ctx.needs_input_grad[1]:
            by_gate = by_a.T @ x
        if ctx.needs_input_grad[2]:
            by_up = by_b.T @ x
        if ctx.needs_input_grad[0]:
            by_hidden = torch.addmm(by_a @ gate, by_b, up).view(hidden.shape)
        return by_hidden, by_gate, by_up, by_down


def _wide(tensor: Tensor) -> Tensor:
    """In float32, unless it is wider."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
