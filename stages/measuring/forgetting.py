"""What a skill costs: how much worse the model has become at general text, and where it has moved.

Rows of text that nothing was trained on are read by the model before and after; both see the same
rows, so the difference is paired. The unit is a row; the interval comes from resampling rows.
"""

from dataclasses import dataclass
from math import exp
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stages.formats.importance import bootstrap_interval, read_subspaces
from stages.formats.tokens import read_rows
from stages.measuring.drift import Site, counterparts, subspace_drift


class Forgot(RuntimeError):
    """A skill was learnt at the cost of more than the allowed share of everything else."""


@dataclass(frozen=True)
class Forgetting:
    """The ratio of perplexities, after to before, with its 95 % interval."""

    ratio: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"x{self.ratio:.4f} [{self.low:.4f}, {self.high:.4f}]"


def general_rows(prepared: Path, source: str, count: int) -> Tensor:
    """Held-out rows of a source of text, (N, T) int64.

    Raises ValueError, naming what there is, for a source that prepare was not given.
    """
    sources = read_rows(prepared, "heldout")
    if source not in sources:
        raise ValueError(
            f"'general_text' is '{source}', of which there are no held-out rows, but of "
            f"{', '.join(sources)}; name one of these, or add it to prepare.datasets"
        )
    return torch.from_numpy(sources[source][:count])


@torch.no_grad()
def row_losses(model: PreTrainedModel, rows: Tensor, batch_rows: int) -> Tensor:
    """Mean cross-entropy in nats of each row of tokens (N, T): (N,)."""
    losses = []
    head = model.get_output_embeddings()
    for batch in rows.to(model.device).split(batch_rows):
        hidden = model.base_model(batch, use_cache=False).last_hidden_state[:, :-1]
        for states, labels in zip(hidden, batch[:, 1:], strict=True):
            logits = head(states.to(head.weight.dtype)).float()
            losses.append(torch.nn.functional.cross_entropy(logits, labels))
    return torch.stack(losses).cpu()


def compare(before: Tensor, after: Tensor, resamples: int = 1000, seed: int = 0) -> Forgetting:
    """How much worse: from the losses (N,) of the same rows before and after."""
    worse = after - before
    low, high = bootstrap_interval(worse, resamples, seed)
    return Forgetting(*(float(exp(value)) for value in (worse.double().mean(), low, high)))


def require_kept(forgetting: Forgetting, limit: float, name: str) -> None:
    """Refuse a model whose perplexity of general text has risen by more than `limit`."""
    if not forgetting.ratio <= 1 + limit:  # NaN is not
        raise Forgot(
            f"{name}: perplexity of general text is {forgetting} times what it was, and at most "
            f"{1 + limit:g} is allowed; lower learning_rate or steps, raise general_rows, or allow "
            "more with 'forgetting'"
        )


def measure_drift(
    before: PreTrainedModel,
    after: PreTrainedModel,
    dropped: list[int],
    profile: Path,
    rows: Tensor,
    batch_rows: int,
) -> dict[int, float]:
    """How far each block's output has moved in the subspace of the teacher's block that it stands
    for (drift.py): block of the teacher -> drift. `before` and `after` have one shape."""
    subspaces = read_subspaces(profile)
    places = counterparts(range(len(subspaces.mean)), dropped)
    sites = [Site(block, place, place) for block, place in places.items()]
    tokens = rows.to(before.device)
    found = subspace_drift(before, after, sites, subspaces, tokens, batch_rows)
    return dict(zip(places, found, strict=True))
