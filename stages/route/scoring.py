"""How well a router routes: shares, macro-F1, calibration, and telling what is out of scope."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modeling.router import Router, expected_calibration_error
from stages.measuring.statistics import Share
from stages.route.fitting import Labelled


@dataclass(frozen=True)
class Routed:
    """What a router made of some queries: the classes they have and get, and how sure it was.

    given: the class chosen, the last one where the router abstains.  confidence: of the likeliest
    capability, (N,).
    """

    names: tuple[str, ...]
    classes: Tensor
    given: Tensor
    confidence: Tensor

    @property
    def inside(self) -> Tensor:
        """Which queries are of a capability, (N,) bool."""
        return self.classes < len(self.names)

    @property
    def confusion(self) -> Tensor:
        """How many queries of each class (row) were given each class (column)."""
        size = len(self.names) + 1
        return torch.bincount(self.classes * size + self.given, minlength=size * size).view(
            size, size
        )


def route(router: Router, data: Labelled) -> Routed:
    """Route labelled states."""
    names = router.shape.capabilities
    places = {name: index for index, name in enumerate(names)}
    choices = router.choose(data.states)
    given = [places[next(iter(c.weights))] if c.weights else len(names) for c in choices]
    confidence = torch.tensor([choice.confidence for choice in choices])
    return Routed(names, data.classes, torch.tensor(given), confidence)


def right(routed: Routed) -> Share:
    """The share of queries that get the class they have."""
    return Share(int((routed.given == routed.classes).sum()), len(routed.classes))


def macro_f1(routed: Routed) -> float:
    """The mean F1 of the classes that some query has."""
    table = routed.confusion.double()
    there = table.sum(1) > 0
    f1 = 2 * table.diagonal() / (table.sum(0) + table.sum(1)).clamp_min(1)
    return f1[there].mean().item()


def auroc(inside: Tensor, outside: Tensor) -> float:
    """How often a query in scope is more confident than one out of it; ties count half."""
    both = torch.cat((inside, outside)).double()
    _, place, counts = both.unique(return_inverse=True, return_counts=True)
    rank = (counts.cumsum(0) - (counts - 1) / 2)[place]  # from 1, the mean of ties
    n, m = len(inside), len(outside)
    return ((rank[:n].sum() - n * (n + 1) / 2) / (n * m)).item()


def calibration_error(routed: Routed) -> float:
    """Expected calibration error of the likeliest capability, on queries in scope."""
    inside = routed.inside
    most = routed.confidence[inside].tolist()
    hits = (routed.given == routed.classes)[inside].tolist()
    return expected_calibration_error(most, hits)


def coverage_and_risk(routed: Routed) -> tuple[list[float], list[float]]:
    """Answering the most confident queries first: the share answered, and of these the wrong.

    A query out of scope that is answered is wrong, whatever answers it.
    """
    order = routed.confidence.argsort(descending=True, stable=True)
    wrong = (routed.given != routed.classes) | ~routed.inside
    count = torch.arange(1, len(order) + 1)
    return (count / len(order)).tolist(), (wrong[order].cumsum(0) / count).tolist()


def load(routed: Routed) -> dict[str, float]:
    """The share of the answered queries that each capability gets."""
    answered = routed.given[routed.given < len(routed.names)]
    counts = torch.bincount(answered, minlength=len(routed.names)).double()
    return dict(zip(routed.names, (counts / counts.sum().clamp_min(1)).tolist(), strict=True))


def changes(before: Routed, after: Routed, names: Sequence[str]) -> dict[str, float]:
    """How the share right of each named capability changed, in points."""
    found = {}
    for name in names:
        one, other = (
            (routed.given == routed.classes)[routed.classes == routed.names.index(name)]
            for routed in (before, after)
        )
        found[name] = 100 * (other.double().mean() - one.double().mean()).item()
    return found
