"""Shares with their intervals, and whether two of them differ on the same items."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, sqrt

import numpy as np

Z = 1.959963984540054  # 95 % of a normal distribution


@dataclass(frozen=True)
class Share:
    """How many of how many, with the 95 % interval."""

    hits: int
    count: int

    @property
    def value(self) -> float:
        """The share; 0 of 0 is 0."""
        return self.hits / self.count if self.count else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's score interval (1927), which holds for shares near 0 and 1 as well."""
        if not self.count:
            return 0.0, 1.0
        n, p = self.count, self.value
        middle = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
        half = Z * sqrt(p * (1 - p) / n + Z * Z / (4 * n * n)) / (1 + Z * Z / n)
        low = middle - half if self.hits else 0.0  # exactly: rounding would leave a rest
        high = middle + half if self.hits < self.count else 1.0
        return low, high

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.1%} [{low:.1%}, {high:.1%}]"


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> float:
    """The two-sided exact p-value that `after` is right as often as `before`, item by item.

    McNemar 1947, by the binomial of the items on which they differ. Raises ValueError when they are
    not of the same items.
    """
    if len(before) != len(after):
        raise ValueError(f"{len(before)} and {len(after)} items; compare results of the same items")
    gained = sum(a and not b for b, a in zip(before, after, strict=True))
    lost = sum(b and not a for b, a in zip(before, after, strict=True))
    differ, fewer = gained + lost, min(gained, lost)
    tail = sum(comb(differ, k) for k in range(fewer + 1)) / 2**differ
    return min(1.0, 2 * tail)


def sign_flip_p(differences: Sequence[float], seed: int, flips: int = 10_000) -> float:
    """The two-sided p-value that paired differences are as likely negative as positive.

    Fisher's randomisation test (1935) of their mean, by some random flips of their signs.
    """
    found = np.asarray(differences, dtype=np.float64)
    signs = np.random.default_rng(seed).choice((-1.0, 1.0), size=(flips, len(found)))
    as_far = np.abs(signs @ found) >= abs(found.sum()) - 1e-12 * np.abs(found).sum()
    return float((1 + as_far.sum()) / (1 + flips))
