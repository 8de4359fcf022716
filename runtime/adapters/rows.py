"""Which rows of a batch get which adapters, and the products that are added to them alone.

The model's own products run over all rows together; an adapter's two small ones run over its rows,
and their result is added there: scale weight (x down) up. A row may have none, one, or a weighted
mix of several (the mix of what they add, as in Arrow or LoRA soups; not of what they would say).

Products by segments, not all adapters stacked and masked: with 8 adapters in 32 rows stacking does
eight times the arithmetic, and a row would not be safe from another's infinities. Measured (AVX2,
float32, one thread, a block of SmolLM2, rank 16 on all layers, beside 3.2 ms of the block's own
products): segments 1.1 ms, stacked 2.1. Copies of the adapters that are stacked for one batched
product take 0.85, but twice the memory and 150 MB of copying whenever the adapters change.

Letters: N tokens of all rows, D inputs and F outputs of some layers with the same input, r rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from runtime.adapters.folder import Adapter

Choice = str | Mapping[str, float] | None  # a name, weights by name, or the model as it is
Mix = tuple[tuple[Adapter, float], ...]  # of one row; empty for the model as it is
Columns = tuple[tuple[str, int, int], ...]  # a layer's name, and which of F are its: first, end


def weights_of(choice: Choice) -> dict[str, float]:
    """A choice as weights by name. Raises ValueError for a weight that is no finite number."""
    if choice is None:
        return {}
    if isinstance(choice, str):
        return {choice: 1.0}
    for name, weight in choice.items():
        if not isfinite(weight):
            raise ValueError(f"the weight of adapter '{name}' is {weight}; it must be finite")
    return {name: float(weight) for name, weight in sorted(choice.items()) if weight}


@dataclass(frozen=True)
class _Segment:
    """Tokens that get the same of one adapter."""

    adapter: Adapter
    weight: float
    rows: slice  # of the tokens, or of RowDeltas' gathered ones


def deltas_of(
    mixes: Sequence[Mix] | None, counts: Sequence[int], device: torch.device
) -> "RowDeltas | None":
    """What is added in a pass over some tokens of each row; None where no row has an adapter."""
    return RowDeltas(mixes, counts, device) if mixes is not None and any(mixes) else None


class RowDeltas:
    """What adapters add in one forward pass over the tokens of some rows."""

    def __init__(self, mixes: Sequence[Mix], counts: Sequence[int], device: torch.device) -> None:
        """A mix and a number of tokens for each row; the rows' tokens lie one behind the other."""
        ends = torch.tensor(counts).cumsum(0).tolist()
        spans: dict[tuple[Adapter, float], list[tuple[int, int]]] = {}
        for mix, end, count in zip(mixes, ends, counts, strict=True):
            for part in mix if count else ():
                runs = spans.setdefault(part, [])
                if runs and runs[-1][1] == end - count:  # goes on where the row before ended
                    runs[-1] = (runs[-1][0], end)
                else:
                    runs.append((end - count, end))
        self.tokens: int = ends[-1]
        self.layers = {name for adapter, _ in spans for name in adapter.layers}
        self._gathered: Tensor | None = None
        if all(len(runs) == 1 for runs in spans.values()):
            self._segments = [_Segment(*part, slice(*runs[0])) for part, runs in spans.items()]
        else:
            self._gather(spans, device)

    def _gather(
        self, spans: dict[tuple[Adapter, float], list[tuple[int, int]]], device: torch.device
    ) -> None:
        """Bring tokens that are apart together, once for all adapters of a layer."""
        order: list[int] = []
        self._segments = []
        for part, runs in spans.items():
            first = len(order)
            order += [token for run in runs for token in range(*run)]
            self._segments.append(_Segment(*part, slice(first, len(order))))
        self._gathered = torch.tensor(order, device=device)

    def add_to(self, y: Tensor, x: Tensor, columns: Columns) -> None:
        """Add to the results y (N, F) of layers, in place, what adapters make of x (N, D)."""
        if self._gathered is None:
            self._add(y, x, columns)
        elif any(name in self.layers for name, _, _ in columns):
            delta = y.new_zeros((len(self._gathered), y.shape[-1]))
            self._add(delta, x[self._gathered], columns)
            y.index_add_(0, self._gathered, delta)

    def _add(self, y: Tensor, x: Tensor, columns: Columns) -> None:
        for segment in self._segments:
            own, into, layers = x[segment.rows], y[segment.rows], segment.adapter.layers
            for name, first, end in columns:
                if (layer := layers.get(name)) is not None:
                    part = into[:, first:end]
                    part.addmm_(own @ layer.down, layer.up, alpha=layer.scale * segment.weight)
