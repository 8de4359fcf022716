"""Shares: known intervals and p-values."""

import pytest

from stages.measuring.statistics import Share, mcnemar


def test_intervals_are_wilsons() -> None:
    assert Share(0, 48).interval == pytest.approx((0.0, 0.0741), abs=1e-4)
    assert Share(36, 64).interval == (
        pytest.approx(0.4409, abs=1e-4),
        pytest.approx(0.6771, abs=1e-4),
    )
    assert Share(0, 0).interval == (0.0, 1.0)
    for count in range(1, 200):  # without a rest: 0 is never below it, nor 1 above
        assert Share(0, count).interval[0] == 0.0
        assert Share(count, count).interval[1] == 1.0
    assert str(Share(32, 32)) == "100.0% [89.3%, 100.0%]"


def test_mcnemar_looks_at_the_items_that_differ_alone() -> None:
    same = [True] * 50 + [False] * 50
    assert mcnemar(same, same) == 1.0
    five_gained = [True] * 55 + [False] * 45
    assert mcnemar(same, five_gained) == pytest.approx(2 / 2**5)
    assert mcnemar(five_gained, same) == pytest.approx(2 / 2**5)
    with pytest.raises(ValueError, match="2 and 3 items"):
        mcnemar([True, True], [True] * 3)
