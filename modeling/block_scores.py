"""Scores of structural blocks: how much of a computation hangs on each.

Of readings (modeling/block_readings.py) over many tokens, with x, g, |x|, |g| as there:

    activation     mean |x|                     gradient    mean |g|
    taylor         mean |<x, g>|  (Molchanov 2019)
    second order   mean of  - <x, g> + <x, g>^2 / 2:  what cutting the block costs, in nats a token.
                   The square of a first derivative stands for the second one, as in the empirical
                   Fisher information; cross terms between tokens are left out
    SPS            z(|x|) - z(|g|) of a token (Tiny-ONN's synergistic prediction score): high where
                   a block is active and little of the loss hangs on it
    ∫SPS           z of the mean of SPS over tokens

z(v) = (v - median) / (1.4826 MAD), robust, over the blocks of a kind: in their layer ("layer"), or
in all layers ("global").

Letters: B rows, T tokens a row, N blocks of a site.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from modeling.block_readings import Reading
from modeling.block_sites import Site

MAD_TO_DEVIATION = 1.4826  # of a normal distribution
LAYER, GLOBAL = "layer", "global"
SCALES = (LAYER, GLOBAL)


class BlockStatistics:
    """Sums over tokens, from which all scores follow; grows batch by batch."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self.sites = list(sites)
        self.tokens = 0
        self.sums: dict[str, list[Tensor]] = {}  # name -> a site each: (N,) float64

    def add(self, readings: Sequence[Reading], real: Tensor) -> None:
        """Count what the blocks did on the tokens that are real, (B, T) bool."""
        told = [reading.of(real) for reading in readings]
        parts: dict[str, list[Tensor]] = {
            "activation": [one.activation for one in told],
            "gradient": [one.gradient for one in told],
            "taylor": [one.taylor.abs() for one in told],
            "second order": [one.taylor.square() / 2 - one.taylor for one in told],
        }
        for scale in SCALES:
            parts[f"sps {scale}"] = sps(told, self.sites, scale)
        for name, values in parts.items():
            new = [value.double().sum(0) for value in values]
            old = self.sums.get(name, [0.0] * len(new))
            self.sums[name] = [a + b for a, b in zip(old, new, strict=True)]
        self.tokens += int(real.sum())

    def mean(self, name: str) -> list[Tensor]:
        """A mean over tokens, a site each: (N,) float64."""
        return [total / self.tokens for total in self.sums[name]]

    def integrated_sps(self, scale: str) -> list[Tensor]:
        """∫SPS, a site each: (N,) float64."""
        return over_kinds(self.mean(f"sps {scale}"), self.sites, scale)


def sps(readings: Sequence[Reading], sites: Sequence[Site], scale: str) -> list[Tensor]:
    """SPS of each token and block, a site each: (tokens, N). scale: LAYER or GLOBAL."""
    activations = over_kinds([one.activation for one in readings], sites, scale)
    gradients = over_kinds([one.gradient for one in readings], sites, scale)
    return [a - g for a, g in zip(activations, gradients, strict=True)]


def over_kinds(values: Sequence[Tensor], sites: Sequence[Site], scale: str) -> list[Tensor]:
    """The robust z of values (..., N), a site each, over the blocks of a kind."""
    if scale == LAYER:
        return [robust_z(value) for value in values]
    places: dict[str, list[int]] = defaultdict(list)
    for place, site in enumerate(sites):
        places[site.kind].append(place)
    found: dict[int, Tensor] = {}
    for members in places.values():
        together = robust_z(torch.cat([values[place] for place in members], -1))
        parts = together.split([sites[place].count for place in members], -1)
        found |= dict(zip(members, parts, strict=True))
    return [found[place] for place in range(len(sites))]


def robust_z(values: Tensor) -> Tensor:
    """Distances from the median of the last axis, in units of 1.4826 MAD; 0 where all are alike."""
    apart = values - values.median(-1, keepdim=True).values
    scale = MAD_TO_DEVIATION * apart.abs().median(-1, keepdim=True).values
    return torch.where(scale > 0, apart / scale.clamp_min(torch.finfo(scale.dtype).tiny), 0.0)
