"""Recovery: what runs away is taken back, and says why; a stop changes no bit of that."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from stages.learning.recovery import ENOUGH, MOST, Limits, Recovery, RunAway
from stages.learning.training import TrainState


def started(folder: Path, spike: float = 3.0, regression: float = 0.1) -> Recovery:
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(4, 3))
    state = TrainState([("w", parameter)], 1e-2, 1000)
    recovery = Recovery(state, Limits(spike, regression), folder)
    recovery.weight = parameter
    return recovery


def learn(recovery: Recovery, steps: int) -> None:
    for _ in range(steps):
        recovery.weight.grad = torch.full_like(recovery.weight, 1.0 + recovery.state.step)
        recovery.state.update(0.0, 1.0)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_refused_at_once(tmp_path: Path, loss: float) -> None:
    recovery = started(tmp_path)
    assert str(loss) in recovery.refuses(loss)
    assert recovery.refuses(1.0) is None


def test_a_spike_is_far_above_what_was_usual_and_needs_enough_to_know_that(tmp_path: Path) -> None:
    recovery = started(tmp_path)
    recovery.begin(2.0)
    for number in range(ENOUGH):
        assert recovery.refuses(100.0 if number == 3 else 1.0) is None
    assert recovery.refuses(6.9) is None
    assert "the median of the last ones 1" in recovery.refuses(7.1)  # 1 + 3 x 2
    assert recovery.refuses(1.0) is None  # what was refused is not usual


def test_a_loss_that_comes_near_zero_and_below_is_no_reason(tmp_path: Path) -> None:
    """As that of draws does, which is an estimate."""
    recovery = started(tmp_path)
    recovery.begin(0.5)
    for number in range(60):
        assert recovery.refuses(0.05 if number % 2 else -0.05) is None
    assert recovery.validated(-0.02) is None
    assert recovery.validated(0.02) is None


def test_a_state_is_refused_when_validation_is_well_above_its_best(tmp_path: Path) -> None:
    recovery = started(tmp_path)
    recovery.begin(2.0)
    assert recovery.validated(2.15) is None
    assert recovery.validated(1.0) is None
    assert "its best was 1" in recovery.validated(1.21)
    assert recovery.validated(math.nan) is not None


def test_it_goes_back_to_the_best_validated_state_slower_and_no_step_is_repeated(
    tmp_path: Path,
) -> None:
    recovery = started(tmp_path)
    recovery.begin(2.0)
    learn(recovery, 3)
    assert recovery.validated(1.0) is None
    best = recovery.weight.detach().clone()
    learn(recovery, 2)
    assert not torch.equal(recovery.weight, best)
    recovery.weight.grad = torch.ones_like(recovery.weight)
    recovery.state.pass_over()
    back = recovery.roll_back("it was told to")
    assert (back.step, back.to_step, back.reason) == (6, 3, "it was told to")
    assert torch.equal(recovery.weight, best) and recovery.weight.grad is None
    assert (recovery.state.step, recovery.state.scale) == (6, 0.5)

    other = started(tmp_path / "other")  # the optimizer is that of step 3, too
    learn(other, 3)
    other.state.step, other.state.scale = 6, 0.5
    learn(recovery, 1)
    learn(other, 1)
    assert torch.equal(recovery.weight, other.weight)


def test_who_runs_away_too_often_is_stopped_with_the_last_reason(tmp_path: Path) -> None:
    recovery = started(tmp_path)
    recovery.begin(1.0)
    for _ in range(MOST):
        recovery.roll_back("again")
    with pytest.raises(RunAway, match="taken back 5 times.*the last straw.*learning rate"):
        recovery.roll_back("the last straw")


def test_a_resumed_recovery_is_the_same_to_the_bit_whatever_happened_after_its_checkpoint(
    tmp_path: Path,
) -> None:
    def first_half(recovery: Recovery) -> None:
        recovery.begin(2.0)
        for _ in range(4):
            assert recovery.refuses(1.0) is None
            learn(recovery, 1)
        recovery.validated(1.5)
        learn(recovery, 1)
        recovery.roll_back("first")

    def second_half(recovery: Recovery) -> tuple:
        learn(recovery, 2)
        recovery.validated(1.2)
        learn(recovery, 1)
        recovery.roll_back("second")
        learn(recovery, 1)
        return recovery.weight.detach().clone(), recovery.rollbacks, recovery.state.scale

    whole = started(tmp_path / "whole")
    first_half(whole)
    expected = second_half(whole)

    halted, folder = started(tmp_path / "halted"), tmp_path / "checkpoint"
    folder.mkdir()
    first_half(halted)
    halted.save(folder)
    second_half(halted)  # work that is lost: a better state was kept meanwhile
    resumed = started(tmp_path / "halted")
    resumed.load(folder)
    found = second_half(resumed)
    assert torch.equal(found[0], expected[0]) and found[1:] == expected[1:]


def test_only_the_best_states_that_checkpoints_need_are_kept(tmp_path: Path) -> None:
    recovery, folder = started(tmp_path / "best"), tmp_path / "checkpoint"
    folder.mkdir()
    recovery.begin(9.0)
    for loss in (8.0, 7.0, 6.0):
        learn(recovery, 1)
        recovery.validated(loss)
        recovery.save(folder)
    assert sorted(path.name for path in (tmp_path / "best").iterdir()) == [
        "best-00000002", "best-00000003",
    ]  # fmt: skip
