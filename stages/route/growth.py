"""What adding a capability to a finished router changes for the others: each is left out once."""

from dataclasses import dataclass

import torch
from torch import Tensor

from modeling.router import RouterShape
from stages.route.fitting import Course, Labelled, add_capability, calibrate, train_router
from stages.route.scoring import changes, route


@dataclass(frozen=True)
class Growth:
    """What came of adding a capability last, and of training all of them anew instead.

    right, anew_right: its own share of the measured queries.  changes, anew_changes: of the others'
    shares, in points, from before there was that capability.
    """

    right: float
    changes: dict[str, float]
    anew_right: float
    anew_changes: dict[str, float]


@dataclass(frozen=True)
class Queries:
    """States of the blocks that the router reads: to learn from, to calibrate, to measure."""

    train: Labelled
    validation: Labelled
    measured: Labelled


def leave_out_and_add(
    name: str, queries: Queries, shape: RouterShape, course: Course, answered: float
) -> Growth:
    """Train a router without a capability, then add it; beside one that is trained on all."""
    place = shape.capabilities.index(name)
    others = tuple(other for other in shape.capabilities if other != name)
    seen, new = without(queries.train, place)
    router = train_router(
        RouterShape(others, shape.blocks, shape.width, shape.hidden), seen, course
    )
    calibrate(router, without(queries.validation, place)[0], answered)
    before = route(router, without(queries.measured, place)[0])
    train, validation, measured = (
        moved_last(part, place, len(others))
        for part in (queries.train, queries.validation, queries.measured)
    )
    grown = add_capability(router, name, new, seen, course)
    anew = train_router(grown.shape, train, course)
    found = []
    for after in (grown, anew):
        calibrate(after, validation, answered)
        routed = route(after, measured)
        own = routed.classes == len(others)
        right = (routed.given[own] == len(others)).double().mean().item()
        found += [right, changes(before, routed, others)]
    return Growth(*found)


def without(data: Labelled, place: int) -> tuple[Labelled, Tensor]:
    """The data less a class, later classes one place earlier; and the states of that class."""
    here = data.classes == place
    classes = data.classes[~here]
    return Labelled(data.states[~here], classes - (classes > place).long()), data.states[here]


def moved_last(data: Labelled, place: int, end: int) -> Labelled:
    """The data with a class moved behind the other capabilities, to the place `end`."""
    order = torch.arange(end + 2)
    order[place + 1 : end + 1] -= 1
    order[place] = end
    return Labelled(data.states, order[data.classes])


def together(*parts: Labelled) -> Labelled:
    """Some parts as one."""
    states, classes = ([getattr(p, n) for p in parts] for n in ("states", "classes"))
    return Labelled(torch.cat(states), torch.cat(classes))
