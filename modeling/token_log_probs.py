"""The log-probability that a model gave to each token it chose, without the (N, V) logits.

What policy gradients are made of. The weight of a token's gradient is known only once all
log-probabilities are (ratios, advantages, clips), so the backward pass computes each chunk of
logits again: one more product with the head instead of N x V numbers kept.

    y = z / T      log p_i = y_i - log sum_j exp y_j      d log p_i / dz_j = (1[i = j] - p_j) / T

Letters: N tokens, D hidden width, V vocabulary, T temperature.
"""

import torch
from torch import Tensor

from modeling.losses import CHUNK_TOKENS


def token_log_probs(
    hidden: Tensor, head: Tensor, chosen: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probabilities (N,) of `chosen` (N,) int64, and the distributions' entropies (N,), nats.

    hidden (N, D), behind the final norm; head (V, D), which is not trained. The first result
    back-propagates to `hidden`; the second is for watching.
    """
    return _TokenLogProbs.apply(hidden, head.detach(), chosen, temperature)


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, chosen, temperature):
        found, entropies = [], []
        for part, ids in zip(hidden.split(CHUNK_TOKENS), chosen.split(CHUNK_TOKENS), strict=True):
            log_probs = _log_softmax(part, head, temperature)
            found.append(log_probs.gather(-1, ids[:, None])[:, 0])
            entropies.append(-(log_probs.exp() * log_probs).sum(-1))
        ctx.save_for_backward(hidden, head, chosen)
        ctx.temperature = temperature
        if not found:
            return hidden.new_zeros(0, dtype=torch.float32), hidden.new_zeros(0)
        entropy = torch.cat(entropies)
        ctx.mark_non_differentiable(entropy)
        return torch.cat(found), entropy

    @staticmethod
    def backward(ctx, upstream, _entropy):
        hidden, head, chosen = ctx.saved_tensors
        gradient = torch.empty_like(hidden)
        for start in range(0, len(hidden), CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            weight = upstream[part, None] / ctx.temperature  # (n, 1)
            by_logits = _log_softmax(hidden[part], head, ctx.temperature).exp_().mul_(-weight)
            by_logits.scatter_add_(-1, chosen[part, None], weight)
            gradient[part] = by_logits.to(head.dtype) @ head
        return gradient, None, None, None


def _log_softmax(hidden: Tensor, head: Tensor, temperature: float) -> Tensor:
    """Log-probabilities of (n, D): (n, V) float32."""
    return (hidden @ head.T).float().div_(temperature).log_softmax(-1)
