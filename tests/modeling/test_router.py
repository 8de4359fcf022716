"""The router: its loss, its calibration, what it chooses and when it abstains."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from modeling.router import (
    BadRouter,
    LossWeights,
    Router,
    RouterShape,
    expected_calibration_error,
    fit_temperature,
    open_router,
    router_loss,
    save_router,
)

SHAPE = RouterShape(("tools", "docs"), (2, 3), 8, 16)


def fixed(*rows: list[float]) -> Router:
    """A router whose logits are some rows, whatever it reads: one state, one row."""
    router = Router(RouterShape(("tools", "docs"), (1,), len(rows), 4))
    router.forward = lambda states: states @ torch.tensor(rows)
    return router


def test_the_loss_is_the_sum_of_its_terms() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    p = logits.softmax(-1)
    mean = p.mean(0)
    expected = (
        cross_entropy(logits, labels)
        + 0.1 * logits.exp().sum(-1).log().square().mean()
        + 0.2 * (mean * mean.log()).sum()
        - 0.3 * (p * p.log()).sum(-1).mean()
    )
    assert router_loss(logits, labels, LossWeights(0.1, 0.2, 0.3)).item() == pytest.approx(
        expected.item(), rel=1e-5
    )


def test_diversity_is_rewarded_over_a_batch_and_doubt_about_a_query_is_not() -> None:
    weights, labels = LossWeights(0.0, 1.0, 1.0), torch.tensor([0, 1])
    sure = torch.tensor([[9.0, 0.0], [0.0, 9.0]])
    doubtful = torch.zeros(2, 2)

    def beside(logits: torch.Tensor) -> float:
        return (router_loss(logits, labels, weights) - cross_entropy(logits, labels)).item()

    assert beside(sure) == pytest.approx(-math.log(2), abs=1e-2)
    assert beside(doubtful) == pytest.approx(0.0, abs=1e-6)


def test_the_temperature_undoes_a_scaling_of_calibrated_logits() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4000, 4) * 2
    labels = torch.multinomial(logits.softmax(-1), 1)[:, 0]
    assert fit_temperature(logits * 3, labels) == pytest.approx(3.0, rel=0.1)


def test_calibration_error_is_the_gap_of_confidence_and_success() -> None:
    assert expected_calibration_error([0.9] * 10, [True] * 9 + [False]) == pytest.approx(0.0)
    assert expected_calibration_error([0.9, 0.9], [False, False]) == pytest.approx(0.9)
    assert expected_calibration_error([1.0, 0.05], [True, True]) == pytest.approx(0.475)
    assert expected_calibration_error([], []) == 0.0


def test_it_abstains_where_none_is_likeliest_or_the_likeliest_is_not_likely_enough() -> None:
    router = fixed([2.0, 0.0, 0.0], [0.0, 0.0, 2.0], [0.3, 0.0, 0.0])
    router.threshold.fill_(0.6)
    known, outside, unsure = router.choose(torch.eye(3))
    assert known.weights == {"tools": 1.0} and not known.abstains
    assert known.confidence == pytest.approx(math.exp(2) / (math.exp(2) + 2))
    assert outside.abstains and unsure.abstains


def test_several_are_weighted_by_their_probabilities() -> None:
    (choice,) = fixed([1.0, 0.0, -9.0]).choose(torch.eye(1), most=2)
    assert choice.weights["tools"] == pytest.approx(math.e / (math.e + 1))
    assert sum(choice.weights.values()) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="3 adapters a query of 2"):
        fixed([0.0, 0.0, 0.0]).choose(torch.eye(1), most=3)


def test_a_router_comes_back_as_it_was_written(tmp_path) -> None:
    router = Router(SHAPE).eval()
    router.standardise(torch.randn(20, 2, 8))
    router.temperature.fill_(1.7)
    router.threshold.fill_(0.4)
    save_router(router, tmp_path)
    again, states = open_router(tmp_path, 8), torch.randn(3, 2, 8)
    assert again.shape == SHAPE and again.threshold == router.threshold
    assert torch.equal(again.probabilities(states), router.probabilities(states))


def test_a_router_of_another_student_is_refused(tmp_path) -> None:
    save_router(Router(SHAPE), tmp_path)
    with pytest.raises(BadRouter, match="reads states of width 8; the student's are 16"):
        open_router(tmp_path, 16)
    with pytest.raises(BadRouter, match="holds no router"):
        open_router(tmp_path / "elsewhere", 8)
