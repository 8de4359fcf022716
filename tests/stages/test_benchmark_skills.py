"""Skills in the benchmark: shares, intervals, and what is said of a stage that does not help."""

from pathlib import Path

import pytest

from stages.benchmark.skills import (
    STEPS,
    SkillScores,
    assess,
    flatten_skills,
    skill_verdicts,
)
from stages.measuring.solving import Solved


def solved(right: int, count: int = 40, own_tokens: int = 50) -> list[Solved]:
    """Problems of two operations in turn, the first ones right."""
    return [
        Solved(str(n), n < right, True, own_tokens, 1, "+*"[n % 2], "FINAL: 1")
        for n in range(count)
    ]


def scores() -> SkillScores:
    found = SkillScores()
    for name, right in zip(STEPS, (0, 30, 32, 31), strict=True):
        found.solved[name] = solved(right)
    return found


def test_each_step_is_compared_with_the_one_before_on_the_same_problems() -> None:
    skills = assess(scores())
    assert [skill.right.hits for skill in skills.values()] == [0, 30, 32, 31]
    assert skills["student"].p_value is None
    assert skills["sft"].p_value < 1e-6
    assert skills["toolformer"].p_value == pytest.approx(0.5)
    assert skills["sft"].groups["addition"].hits + skills["sft"].groups["multiplication"].hits == 30


def test_metrics_are_flat_and_named_by_step_and_operation() -> None:
    flat = flatten_skills(assess(scores()))
    assert flat["skills.sft.right"] == 0.75
    assert flat["skills.sft.right_low"] < 0.75 < flat["skills.sft.right_high"]
    assert flat["skills.grpo.multiplication"] == pytest.approx(15 / 20)
    assert flat["skills.student.own_tokens"] == 50


def test_a_step_that_does_not_help_is_said_not_to() -> None:
    first, sft, toolformer, _ = skill_verdicts(assess(scores()))
    assert "McNemar" not in first and "0.0%" in first
    assert "it differs from the step before" in sft
    assert "does NOT clearly differ" in toolformer


def test_scores_come_back_as_they_were_saved(tmp_path: Path) -> None:
    scores().save(tmp_path)
    again = SkillScores()
    again.load(tmp_path)
    assert again == scores() and again.done == 160
