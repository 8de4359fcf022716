"""Honest calls give the right answer: 300 of them, known without the tools."""

from functools import cache

import pytest

from runtime.tools.calls import Call, ToolResult
from runtime.tools.dispatch import Limits, Tools
from tests.runtime.tools.honest_calc import GENERATED, TABLE
from tests.runtime.tools.honest_programs import BASH, PYTHON


@pytest.fixture(scope="module")
def results():
    with Tools(limits=Limits(seconds=20.0)) as tools:
        if tools.refused:
            pytest.skip(f"this system cannot fence tools in: {tools.level}")

        @cache
        def results() -> list[ToolResult]:
            return tools.run_all([call for call, _ in CALLS])

        yield results


CALLS = [
    *((Call("calc", {"expression": text}, ""), value) for text, value in TABLE + GENERATED),
    *((Call("py", {"code": code}, ""), value) for code, value in PYTHON),
    *(
        (Call("bash", {"command": command, "files": files}, ""), value)
        for command, files, value in BASH
    ),
]


@pytest.mark.parametrize("number", range(len(CALLS)))
def test_an_honest_call_gives_the_right_answer(results, number: int) -> None:
    call, value = CALLS[number]
    result = results()[number]
    assert result.ok, (call, result.error)
    assert type(result.value) is type(value), (call, result.value)
    assert result.value == value, call
    assert result.error is None
    assert not result.truncated


def test_there_are_enough_honest_calls() -> None:
    assert len({(call.name, str(call.arguments)) for call, _ in CALLS}) == len(CALLS) >= 200
