"""Draw next tokens from logits, by random numbers that the caller brings.

Letters: N rows, V vocabulary.
"""

import torch
from torch import Tensor

BLOCK = 256  # tokens that are summed before one is looked for in them
NUCLEUS_TRIED = (256, 4096)  # how many of the likeliest tokens are sorted before all are


def draw(
    logits: Tensor, uniforms: list[float], temperature: float, top_p: float
) -> tuple[list[int], list[float]]:
    """One token for each row of logits (N, V), and its log-probability.

    The log-probability is that of the distribution at the temperature, before top_p; of temperature
    1 where it is 0 and the likeliest token is taken. The first token whose cumulative probability
    is above the uniform number is drawn.
    """
    scaled = logits.float() / (temperature or 1.0)
    whole = scaled.logsumexp(-1, keepdim=True)
    if temperature == 0:
        tokens = scaled.argmax(-1, keepdim=True)
    else:
        probabilities = (scaled - whole).exp_()
        if top_p < 1:
            probabilities = nucleus(probabilities, top_p)
        uniform = torch.tensor(uniforms, dtype=torch.float64, device=logits.device)[:, None]
        tokens = invert(probabilities, uniform)
    log_probs = scaled.gather(-1, tokens) - whole
    return tokens[:, 0].tolist(), log_probs[:, 0].tolist()


def nucleus(probabilities: Tensor, share: float) -> Tensor:
    """The fewest likeliest tokens that hold a share of (N, V), the others at 0; not normalised."""
    vocabulary = probabilities.shape[-1]
    for tried in (*NUCLEUS_TRIED, vocabulary):
        values, ids = probabilities.topk(min(tried, vocabulary))
        before = values.cumsum(-1) - values
        if tried >= vocabulary or (before[:, -1] >= share).all():
            break
    kept = values.where(before < share, 0.0)
    return torch.zeros_like(probabilities).scatter_(-1, ids, kept)


def invert(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Where the cumulative sum of (N, V) first is above uniform (N, 1) of its end: (N, 1).

    Sums over blocks first, then within one: a cumulative sum over a whole vocabulary is sequential
    and takes as long as a fifth of the forward pass. A token of probability 0 is never drawn.
    """
    padded = torch.nn.functional.pad(probabilities, (0, -probabilities.shape[-1] % BLOCK))
    blocks = padded.unflatten(-1, (-1, BLOCK))  # (N, V / BLOCK, BLOCK)
    sums = blocks.sum(-1, dtype=torch.float64)
    ends = sums.cumsum(-1)
    block, wanted = _first_above(ends, uniform * ends[:, -1:])
    wanted = wanted - (ends - sums).gather(-1, block)
    inner = blocks[torch.arange(len(blocks), device=block.device), block[:, 0]].double()
    token, _ = _first_above(inner.cumsum(-1), wanted)
    return block * BLOCK + token


def _first_above(ends: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Where ascending sums (N, M) first are above a number (N, 1), which rounding may have put past
    the last one; and the number, brought back below that."""
    wanted = torch.minimum(wanted.clamp(min=0.0), ends[:, -1:] * (1 - 1e-12))
    return torch.searchsorted(ends, wanted, right=True), wanted
