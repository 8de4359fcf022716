"""Routers learn clouds of points, know what lies outside, and take in a capability later."""

from dataclasses import replace

import pytest
import torch

from modeling.router import LossWeights, RouterShape
from stages.measuring.statistics import Share
from stages.route.fitting import (
    Course,
    Labelled,
    add_capability,
    best_depth,
    calibrate,
    train_router,
)
from stages.route.growth import Queries, leave_out_and_add, moved_last, together, without
from stages.route.params import Params
from stages.route.scoring import (
    Routed,
    auroc,
    changes,
    coverage_and_risk,
    load,
    macro_f1,
    right,
    route,
)

NAMES = ("tools", "docs", "code")
COURSE = Course(150, 32, 1e-2, 1e-2, LossWeights(1e-3, 0.1, 0.0), 0)
LONG = replace(COURSE, steps=600)
FIELDS = {
    "capabilities": NAMES, "queries": 9, "blocks": (1, 2), "hidden": 16, "steps": 150,
    "batch_queries": 32, "learning_rate": 1e-2, "weight_decay": 1e-2, "z_loss": 1e-3,
    "diversity": 0.1, "confidence": 0.0, "validation_share": 0.2, "answered": 0.97,
    "seed": 0,
}  # fmt: skip


def clouds(count: int, seed: int, spread: float = 0.5, classes: int = 4) -> Labelled:
    """Points around a corner a class, the last class's around zero."""
    draw = torch.Generator().manual_seed(seed)
    corners = torch.cat((3 * torch.eye(8)[: classes - 1], torch.zeros(1, 8)))
    labels = torch.arange(count * classes) % classes
    noise = torch.randn(len(labels), 8, generator=draw)
    return Labelled((corners[labels] + spread * noise)[:, None], labels)


def test_a_router_learns_to_tell_clouds_apart_and_what_is_none_of_them() -> None:
    router = train_router(RouterShape(NAMES, (1,), 8, 16), clouds(60, 0), COURSE)
    calibrate(router, clouds(40, 1), 0.97)
    routed = route(router, clouds(40, 2))
    assert right(routed).value > 0.9
    assert auroc(routed.confidence[routed.inside], routed.confidence[~routed.inside]) > 0.95


def test_the_same_seed_gives_the_same_router_to_the_bit() -> None:
    shape, data = RouterShape(NAMES, (1,), 8, 16), clouds(30, 0)
    one, other = (train_router(shape, data, COURSE).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


def beside(*parts: Labelled) -> Labelled:
    """The same queries behind several blocks."""
    return Labelled(torch.cat([part.states for part in parts], 1), parts[0].classes)


def test_it_reads_as_deep_as_it_needs_and_no_deeper() -> None:
    def behind(seed: int, count: int) -> Labelled:
        blurred, clear = clouds(count, seed, 6.0), clouds(count, seed)
        return beside(blurred, clear, clouds(count, seed + 9, 6.0))

    shape = RouterShape(NAMES, (2, 5, 7), 8, 16)
    router, losses = best_depth(behind(0, 60), behind(1, 40), shape, COURSE, 0.97)
    assert router.shape.blocks == (2, 5) and set(losses) == {2, 5, 7}
    assert losses[5] < losses[2] / 2
    assert router.probabilities(behind(2, 5).first(2).states).shape == (20, 4)


def test_the_threshold_lets_the_wanted_share_of_known_queries_through() -> None:
    router = train_router(RouterShape(NAMES, (1,), 8, 16), clouds(60, 0, 1.2), COURSE)
    validation = clouds(100, 1, 1.2)
    calibrate(router, validation, 0.8)
    confidence = torch.tensor([choice.confidence for choice in router.choose(validation.states)])
    inside = validation.classes < len(NAMES)
    passed = (confidence[inside] >= router.threshold).double().mean().item()
    assert passed == pytest.approx(0.8, abs=0.02)


def test_an_added_capability_is_known_and_the_others_are_told_apart_as_before() -> None:
    seen, new = without(clouds(60, 0), 1)
    router = train_router(RouterShape(("tools", "code"), (1,), 8, 16), seen, LONG)
    before = {name: tensor.clone() for name, tensor in router.state_dict().items()}
    grown = add_capability(router, "docs", new, seen, LONG)
    assert grown.shape.capabilities == ("tools", "code", "docs")
    assert all(torch.equal(before[n], t) for n, t in router.state_dict().items())
    states = seen.states
    old, now = (
        found.detach().softmax(-1) for found in (router(states), grown(states)[:, [0, 1, 3]])
    )
    forgetful = add_capability(
        router, "docs", new, Labelled(seen.states[:0], seen.classes[:0]), LONG
    )
    alone = forgetful(states)[:, [0, 1, 3]].detach().softmax(-1)
    assert (now - old).abs().mean() < 0.7 * (alone - old).abs().mean()
    data = moved_last(clouds(40, 2), 1, 2)
    calibrate(grown, moved_last(clouds(40, 1), 1, 2), 0.97)
    assert right(route(grown, data)).value > 0.85
    with pytest.raises(ValueError, match="knows 'docs' already"):
        add_capability(grown, "docs", new, seen, LONG)


def test_leaving_out_and_adding_says_what_it_does_to_the_others() -> None:
    queries = Queries(clouds(60, 0), clouds(30, 1), clouds(30, 2))
    growth = leave_out_and_add("docs", queries, RouterShape(NAMES, (1,), 8, 16), LONG, 0.97)
    assert set(growth.changes) == set(growth.anew_changes) == {"tools", "code"}
    assert growth.right > 0.8 and growth.anew_right > 0.8
    assert min(growth.changes.values()) > -10


def test_parts_are_put_together_in_their_order() -> None:
    one, other = clouds(2, 0), clouds(3, 1)
    both = together(one, other)
    assert torch.equal(both.states[:8], one.states) and torch.equal(both.classes[8:], other.classes)


def test_classes_are_renumbered_when_one_goes_or_comes_last() -> None:
    data = Labelled(torch.arange(8.0).view(4, 1, 2), torch.tensor([0, 1, 2, 3]))
    left, taken = without(data, 1)
    assert left.classes.tolist() == [0, 1, 2] and taken.tolist() == [[[2.0, 3.0]]]
    assert moved_last(data, 0, 2).classes.tolist() == [2, 0, 1, 3]


# --- figures ---------------------------------------------------------------------------------

ROUTED = Routed(
    ("tools", "docs"),
    torch.tensor([0, 0, 1, 1, 2, 2]),
    torch.tensor([0, 1, 1, 1, 2, 0]),
    torch.tensor([0.9, 0.8, 0.7, 0.6, 0.2, 0.85]),
)


def test_shares_f1_and_load_are_those_of_the_confusion_table() -> None:
    assert right(ROUTED) == Share(4, 6)
    assert ROUTED.confusion.tolist() == [[1, 1, 0], [0, 2, 0], [1, 0, 1]]
    assert macro_f1(ROUTED) == pytest.approx((1 / 2 + 4 / 5 + 2 / 3) / 3)
    assert load(ROUTED) == {"tools": 2 / 5, "docs": 3 / 5}


def test_auroc_is_the_share_of_pairs_in_order() -> None:
    inside, outside = torch.tensor([0.9, 0.5, 0.5]), torch.tensor([0.5, 0.1])
    assert auroc(inside, outside) == pytest.approx((2 + 1.5 + 1.5) / 6)
    assert auroc(torch.ones(3), torch.ones(2)) == pytest.approx(0.5)


def test_risk_is_of_the_most_confident_first_and_counts_answers_out_of_scope() -> None:
    coverage, risk = coverage_and_risk(ROUTED)
    assert coverage[-1] == 1.0
    assert risk == pytest.approx([0, 1 / 2, 2 / 3, 2 / 4, 2 / 5, 3 / 6])


def test_changes_are_in_points_of_each_capability() -> None:
    later = Routed(
        ROUTED.names, ROUTED.classes, torch.tensor([0, 0, 1, 0, 2, 2]), ROUTED.confidence
    )
    assert changes(ROUTED, later, ("tools", "docs")) == {"tools": 50.0, "docs": -50.0}


# --- parameters ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"capabilities": ("tools",)}, "name two or more"),
        ({"capabilities": ("tools", "tools")}, "each once"),
        ({"blocks": (3, 2)}, "ascending"),
        ({"blocks": (0, 2)}, "from 1 on"),
        ({"answered": 0.2}, "'answered' is 0.2"),
        ({"diversity": -1.0}, "'diversity' is -1.0"),
    ],
)
def test_parameters_that_make_no_router_are_refused(changed: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Params(**{**FIELDS, **changed})
