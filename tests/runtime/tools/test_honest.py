"""Honest calls give the right answer: 300 of them, known without the tools."""

import pytest

from runtime.tools.calls import Call, ToolResult
from runtime.tools.dispatch import Limits, Tools
from tests.runtime.tools.honest_calc import GENERATED, TABLE
from tests.runtime.tools.honest_programs import BASH, PYTHON

CALCULATIONS = [
    (Call("calc", {"expression": text}, ""), value) for text, value in TABLE + GENERATED
]
PROGRAMS = [
    *((Call("py", {"code": code}, ""), value) for code, value in PYTHON),
    *(
        (Call("bash", {"command": command, "files": files}, ""), value)
        for command, files, value in BASH
    ),
]


@pytest.fixture(scope="module")
def calculated(calculator) -> list[ToolResult]:
    return calculator.run_all([call for call, _ in CALCULATIONS])


@pytest.fixture(scope="module")
def ran() -> list[ToolResult]:
    with Tools(("py", "bash"), Limits(seconds=20.0)) as tools:
        if tools.refused:
            pytest.skip(f"this system cannot fence tools in: {tools.level}")
        return tools.run_all([call for call, _ in PROGRAMS])


@pytest.mark.parametrize("number", range(len(CALCULATIONS)))
def test_the_calculator_is_right(calculated, number: int) -> None:
    check(*CALCULATIONS[number], calculated[number])


@pytest.mark.parametrize("number", range(len(PROGRAMS)))
def test_a_program_or_command_gives_the_right_answer(ran, number: int) -> None:
    check(*PROGRAMS[number], ran[number])


def check(call: Call, value: object, result: ToolResult) -> None:
    assert result.ok, (call, result.error)
    assert type(result.value) is type(value), (call, result.value)
    assert result.value == value, call
    assert result.error is None
    assert not result.truncated


def test_there_are_enough_honest_calls() -> None:
    calls = [call for call, _ in CALCULATIONS + PROGRAMS]
    assert len({(call.name, str(call.arguments)) for call in calls}) == len(calls) >= 200
