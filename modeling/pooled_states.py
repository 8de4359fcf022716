"""What a model makes of a query: the mean of its own tokens' states behind some blocks.

Only the query's tokens count. The template's are the same in every prompt, though those behind it
have read it; and a mean says what a query is about at any length. Of a long query the first
MOST_TOKENS count, so that reading one costs at most so much.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modeling.blocks import capture_calls, dissect, run_block

MOST_TOKENS = 256

Span = tuple[int, int]  # the first of a prompt's tokens that is the query's, and behind the last


@torch.no_grad()
def pooled_states(
    model: PreTrainedModel, prompts: Sequence[list[int]], spans: Sequence[Span], blocks: list[int]
) -> Tensor:
    """Mean states of some prompts of the same length: (N, blocks, D) float32.

    blocks: counted from 1, ascending; those behind the last are not run. A query without tokens has
    the state of the token in front of it.
    """
    cut = max(bounds(span)[1] for span in spans)
    calls = capture_calls(model, torch.tensor([p[:cut] for p in prompts], device=model.device))
    hidden, found = calls.hidden, []
    for index, block in enumerate(dissect(model).blocks[: blocks[-1]], start=1):
        hidden = run_block(block, calls, index - 1, hidden)
        if index in blocks:
            states = [mean_state(hidden[row], span) for row, span in enumerate(spans)]
            found.append(torch.stack(states))
    return torch.stack(found, 1)


def mean_state(hidden: Tensor, span: Span) -> Tensor:
    """The mean (D,) float32 of a query's own tokens' states, from those of its prompt (T, D)."""
    return hidden[slice(*bounds(span))].float().mean(0)


def bounds(span: Span) -> Span:
    """Which tokens are averaged over."""
    start, end = span
    if end <= start:
        return max(0, start - 1), max(1, start)
    return start, min(end, start + MOST_TOKENS)
