"""Problems: what decides, what is reported and what is learnt from never meet."""

from pathlib import Path

import pytest

from stages.formats.conversations import write_conversations
from stages.measuring.problems import benchmark_problems, open_problems
from stages.prepare.skills import Wanted, arithmetic_tools
from tests.stages.skill_dag import CALLED, HELD_OUT, KNOWN, PLAIN, in_the_head, problem


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Arithmetic as prepare makes it."""
    folder = tmp_path_factory.mktemp("prepared")
    train, heldout = arithmetic_tools(Wanted(80, 80, 0), ())
    write_conversations(folder, CALLED, "train", train)
    write_conversations(folder, CALLED, "heldout", heldout)
    return folder


def kinds(problems) -> set[tuple[str, int]]:
    return {(one.facts["operation"], one.facts["template"]) for one in problems}


def test_probes_and_benchmark_share_no_template_and_nothing_is_learnt_from_either(
    prepared: Path,
) -> None:
    problems, reported = (
        open_problems(prepared, [CALLED], 40),
        benchmark_problems(prepared, [CALLED]),
    )
    assert len(problems.probes) == 40 and len(reported) > 30
    assert not kinds(problems.probes) & kinds(reported)
    measured = {one.prompt for one in (*problems.probes, *reported)}
    assert not measured & {one.prompt for one in problems.known}
    operations = {"+", "-", "*", "/", "several"}
    assert {operation for operation, _ in kinds(reported)} == operations
    assert {operation for operation, _ in kinds(problems.probes)} >= operations - {"several"}


def test_each_problem_is_drawn_once_an_epoch_in_an_order_of_its_own(prepared: Path) -> None:
    problems = open_problems(prepared, [CALLED], 4)
    epoch = [one.id for step in range(20) for one in problems.draw(step, 4, 0)]
    assert len(set(epoch)) == 80
    assert problems.draw(3, 4, 0) == problems.draw(3, 4, 0) != problems.draw(3, 4, 1)
    assert [one.id for one in problems.draw(20, 4, 0)] != epoch[:4]


def test_problems_without_an_answer_are_not_asked(tmp_path: Path) -> None:
    told = in_the_head(KNOWN[0])
    open_ended = type(told)("essay", "talk", told.segments, None)
    write_conversations(tmp_path, PLAIN, "train", [told, open_ended])
    write_conversations(tmp_path, PLAIN, "heldout", [problem(2, 2, 0), open_ended])
    found = open_problems(tmp_path, [PLAIN], 1)
    assert [one.id for one in (*found.known, *found.probes)] == [told.id, "2x2"]


def test_too_few_probes_are_refused_with_what_there_is(tmp_path: Path) -> None:
    write_conversations(tmp_path, CALLED, "train", KNOWN)
    write_conversations(tmp_path, CALLED, "heldout", HELD_OUT)
    assert len(open_problems(tmp_path, [CALLED], 2).probes) == 2
    message = "4 problems to learn from and 2 probes .* 3 are wanted; raise prepare.heldout"
    with pytest.raises(ValueError, match=message):
        open_problems(tmp_path, [CALLED], 3)
