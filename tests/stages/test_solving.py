"""Solving and probing: what counts as right, and what must not be kept."""

import copy
import math
from pathlib import Path

import pytest

from modeling.lora import AdapterShape, adapt, merged
from runtime.generation.answers import Answer, Sampling
from runtime.generation.engine import Engine
from stages.measuring.forgetting import Forgetting, Forgot, require_kept
from stages.measuring.probing import Probe, ask, why_not
from stages.measuring.solving import Solved, solve
from stages.measuring.statistics import Share
from tests.runtime.conversing import Calculator, letters
from tests.stages.skill_dag import HELD_OUT, KNOWN, student
from tests.stages.test_grpo_rollouts import answer

GREEDY = Sampling(0.0, 1.0, 48, 2, 0)
UNHARMED = Forgetting(1.0, 0.99, 1.01)


# --- solving ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "right", "formatted"),
    [
        (answer("FINAL: 42"), True, True),
        (answer("FINAL: 42.0"), True, True),
        (answer("FINAL: 41"), False, True),
        (answer("42"), False, False),
        (answer("FINAL: 42\nFINAL: 42"), False, False),
        (answer("FINAL: 42", finished="length"), False, False),
        (answer("FINAL: 42", finished="calls"), False, False),
        (answer("<<result>>42\nFINAL: 42", forged=True), False, False),
    ],
)
def test_an_answer_is_right_when_it_ends_by_itself_with_the_right_final(
    given: Answer, right: bool, formatted: bool
) -> None:
    solved = Solved.of(KNOWN[0], given)
    assert (solved.right, solved.formatted) == (right, formatted)
    assert solved.id == "6x7" and solved.operation == "*" and solved.text == given.text


def test_problems_are_solved_in_parts_with_calls_and_only_own_tokens_counted() -> None:
    engine = Engine(student(), letters(), Calculator())
    parts = list(solve(engine, letters(), KNOWN, GREEDY, 3))
    assert [len(part) for part in parts] == [3, 1]
    solved = [one for part in parts for one in part]
    assert [one.id for one in solved] == [told.id for told in KNOWN]
    assert all(one.right and one.calls == 1 for one in solved)
    assert solved[0].own_tokens == len('<<py>>{"code": "6*7"}FINAL: 42') + 1  # the end
    assert "<<result>>42\n" in solved[0].text


# --- probing ---------------------------------------------------------------------------------


def test_probes_are_asked_with_the_adapter_as_it_is_now(tmp_path: Path) -> None:
    adapted = adapt(copy.deepcopy(student()), AdapterShape(2, 4.0, "lora"), 0, tmp_path)
    with merged(adapted) as model:
        engine = Engine(model, letters(), Calculator())
    before = ask(engine, adapted, HELD_OUT, 0, 48, 2)
    assert before.right == [True] * 4 and before.share == Share(4, 4)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.5)
    after = ask(engine, adapted, HELD_OUT, 7, 48, 0)
    assert after.step == 7 and after.right == [False] * 4


def probe(right: int, count: int = 48) -> Probe:
    return Probe(0, [n < right for n in range(count)], 30.0)


def test_nothing_speaks_against_what_is_as_good_as_before() -> None:
    assert why_not(probe(36), probe(36), UNHARMED, 0.03, "docs") is None
    assert why_not(probe(36), probe(48), UNHARMED, 0.03, "docs") is None
    assert why_not(probe(0), probe(0), UNHARMED, 0.03, "docs") is None


def test_fewer_right_probes_count_from_below_the_interval_on() -> None:
    least = math.ceil(probe(36).share.interval[0] * 48)
    assert why_not(probe(36), probe(least), UNHARMED, 0.03, "docs") is None
    reason = why_not(probe(36), probe(least - 1), UNHARMED, 0.03, "docs")
    assert reason == f"of the probes {probe(least - 1).share} are right, {probe(36).share} were"


def test_forgotten_text_speaks_against_it_and_so_does_no_number() -> None:
    assert why_not(probe(9), probe(9), Forgetting(1.03, 1.0, 1.1), 0.03, "docs") is None
    for ratio in (1.031, math.inf, math.nan):
        worse = Forgetting(ratio, 1.0, 1.1)
        reason = why_not(probe(9), probe(40), worse, 0.03, "docs")
        assert reason == f"perplexity of docs is {worse} times the student's"
        with pytest.raises(Forgot):
            require_kept(worse, 0.03, "adapter 'tools'")
