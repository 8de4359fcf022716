"""The log-probability that a model gave to each token it chose, without the (N, V) logits.

What policy gradients are made of. The weight of a token's gradient is known only once all
log-probabilities are (ratios, advantages, clips), so the backward pass computes each chunk of
logits again: one more product with the head instead of N x V numbers kept.

    y = z / T      log p_i = y_i - log sum_j exp y_j      d log p_i / dz_j = (1[i = j] - p_j) / T

Letters: N tokens, D hidden width, V vocabulary, T temperature.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from modeling.losses import CHUNK_TOKENS, ROWS


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
        found = hidden.new_empty(len(hidden), dtype=torch.float32)
        entropy = torch.empty_like(found)
        for rows, logits in _chunks(hidden, head, temperature):
            y = logits.float()
            of_chosen = y.gather(-1, chosen[rows, None])
            largest = y.amax(-1, keepdim=True)
            e = (y - largest).exp_()
            total = e.sum(-1, keepdim=True)
            log_z = total.log() + largest
            found[rows] = (of_chosen - log_z)[:, 0]
            entropy[rows] = (log_z - e.mul_(y).sum(-1, keepdim=True) / total)[:, 0]
        ctx.save_for_backward(hidden, head, chosen)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return found, entropy

    @staticmethod
    def backward(ctx, upstream, _entropy):
        hidden, head, chosen = ctx.saved_tensors
        gradient = torch.empty_like(hidden)
        for start in range(0, len(hidden), CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            by_logits = hidden[part] @ head.T
            for rows in _tiles(start, len(by_logits), hidden.device):
                place = by_logits[rows.start - start : rows.stop - start]
                weight = upstream[rows, None] / ctx.temperature  # (n, 1)
                e = place.float().div_(ctx.temperature)
                e.sub_(e.amax(-1, keepdim=True)).exp_()
                e.mul_(-weight / e.sum(-1, keepdim=True))
                e.scatter_add_(-1, chosen[rows, None], weight)
                place.copy_(e)
            torch.mm(by_logits, head, out=gradient[part])
        return gradient, None, None, None


def _chunks(hidden: Tensor, head: Tensor, temperature: float) -> Iterator[tuple[slice, Tensor]]:
    """Logits by the temperature of a few rows at a time, and which these are."""
    for start in range(0, len(hidden), CHUNK_TOKENS):
        logits = hidden[start : start + CHUNK_TOKENS] @ head.T
        for rows in _tiles(start, len(logits), hidden.device):
            yield rows, logits[rows.start - start : rows.stop - start].div_(temperature)


def _tiles(start: int, count: int, device: torch.device) -> Iterator[slice]:
    """Rows of a chunk that are looked at in one go: few enough to stay in a CPU's cache."""
    step = ROWS if device.type == "cpu" else CHUNK_TOKENS
    for row in range(start, start + count, step):
        yield slice(row, min(row + step, start + count))
