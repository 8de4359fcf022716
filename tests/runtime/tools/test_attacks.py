"""Nothing gets out of the sandbox, nothing outstays its deadline, nothing is left behind.

Two servers are attacked: the real one, with text (calc, py, bash), and a hostile one without its
language layer, with code that attacks the system itself. Each table runs once, several calls at a
time; every attack is then a test of its own.
"""

from functools import cache

import psutil
import pytest

from runtime.tools.calls import Call, ToolResult
from runtime.tools.dispatch import Limits, Tools
from tests.runtime.tools import attacks_bash, attacks_calc, attacks_python, attacks_system
from tests.runtime.tools.world import World

DEADLINE_S, GRACE_S = 0.6, 5.0  # grace: the machine may be busy
LIMITS = Limits(seconds=DEADLINE_S, memory_mb=128, at_once=4)
ARGUMENT = {"calc": "expression", "py": "code", "bash": "command"}
FATAL = ("the tool server ended", "cannot be shut in")

PERL = [(name, "perl -e '" + code.replace("'", '"') + "'") for name, code in attacks_system.PERL]


@pytest.fixture(scope="module")
def world():
    with World() as world:
        yield world
        assert world.harm() == []
        assert world.orphans() == []


@pytest.fixture(scope="module")
def calculate(calculator, world):
    return _runner(calculator, world)


@pytest.fixture(scope="module")
def tools(world):
    with Tools(("py", "bash"), LIMITS) as tools:
        yield _runner(tools, world)


@pytest.fixture(scope="module")
def hostile(world):
    with Tools(("py", "bash"), LIMITS, server="tests.runtime.tools.hostile") as tools:
        if tools.protection.missing:
            pytest.skip(f"this system has not all layers: {tools.level}")
        yield _runner(tools, world)


def _runner(tools, world):
    @cache
    def results(name: str, texts: tuple[str, ...]) -> dict[str, ToolResult]:
        calls = [Call(name, {ARGUMENT[name]: world.fill(text)}, "") for text in texts]
        return dict(zip(texts, tools.run_all(calls), strict=True))

    def run(name: str, texts: list[str], text: str) -> ToolResult:
        result = results(name, tuple(texts))[text]
        assert result.seconds < tools.limits.seconds + GRACE_S
        assert world.token not in repr(result)
        assert not (result.error or "").startswith(FATAL), result.error
        assert world.harm() == []
        return result

    return run


# --- attacks by text -------------------------------------------------------------------------


@pytest.mark.parametrize("text", attacks_calc.ESCAPES + attacks_calc.BOMBS)
def test_the_calculator_refuses(calculate, text: str) -> None:
    result = calculate("calc", attacks_calc.ESCAPES + attacks_calc.BOMBS, text)
    assert not result.ok, result.value


@pytest.mark.parametrize("text", attacks_python.ESCAPES)
def test_python_has_no_way_out(tools, text: str) -> None:
    result = tools("py", attacks_python.ESCAPES, text)
    assert not result.ok, result.value


@pytest.mark.parametrize("text", attacks_python.BOMBS)
def test_a_python_bomb_ends(tools, text: str) -> None:
    result = tools("py", attacks_python.BOMBS, text)
    assert not result.ok, result.value


@pytest.mark.parametrize("text", attacks_python.FLOODS)
def test_a_flood_of_python_is_cut(tools, text: str) -> None:
    result = tools("py", attacks_python.FLOODS, text)
    assert result.truncated or not result.ok
    assert len(repr(result.value)) < 3 * LIMITS.output_chars


@pytest.mark.parametrize("text", attacks_bash.REFUSED)
def test_a_command_line_is_refused(tools, text: str) -> None:
    result = tools("bash", attacks_bash.REFUSED, text)
    assert not result.ok, result.value


@pytest.mark.parametrize("text", attacks_bash.FLOODS)
def test_a_flood_of_a_command_is_cut_or_ends(tools, text: str) -> None:
    result = tools("bash", attacks_bash.FLOODS, text)
    assert result.truncated or not result.ok, result.value
    assert len(repr(result.value)) < 3 * LIMITS.output_chars


# --- attacks by code that is out of the language layer ---------------------------------------


@pytest.mark.parametrize("name", [name for name, _ in attacks_system.PYTHON])
def test_code_that_runs_freely_reaches_nothing(hostile, name: str) -> None:
    payloads = dict(attacks_system.PYTHON)
    result = hostile("py", list(payloads.values()), payloads[name])
    assert result.value is None, result.value


@pytest.mark.parametrize("name", [name for name, _ in PERL])
def test_a_command_that_runs_freely_reaches_nothing(hostile, name: str) -> None:
    payloads = dict(PERL)
    result = hostile("bash", list(payloads.values()), payloads[name])
    assert not result.value, result.value


def test_there_are_enough_attacks() -> None:
    system = [code for _, code in attacks_system.PYTHON + attacks_system.PERL]
    tables = (
        attacks_calc.ESCAPES + attacks_calc.BOMBS,
        attacks_python.ESCAPES + attacks_python.BOMBS + attacks_python.FLOODS,
        attacks_bash.REFUSED + attacks_bash.FLOODS,
        system,
    )
    assert all(len(set(table)) == len(table) for table in tables)
    assert sum(map(len, tables)) >= 120


def test_the_payloads_are_real_for_without_any_layer_they_succeed(world) -> None:
    options = {"limits": LIMITS, "server": "tests.runtime.tools.hostile", "unsafe": True}
    python = [dict(attacks_system.PYTHON)[name] for name in attacks_system.CONTROLS]
    perl = [dict(PERL)[name] for name in attacks_system.PERL_CONTROLS]
    with World() as other, Tools(("py", "bash"), layers=(), **options) as tools:
        calls = [Call("py", {"code": other.fill(code)}, "") for code in python]
        calls += [Call("bash", {"command": other.fill(code)}, "") for code in perl]
        results = dict(zip(python + perl, tools.run_all(calls), strict=True))
    assert not [(code, result) for code, result in results.items() if not result.value]


def test_no_process_outlives_its_tools(world) -> None:
    with Tools(("py", "bash"), LIMITS) as tools:
        calls = [Call("bash", {"command": "yes | sort"}, ""), Call("py", {"code": "1"}, "")]
        tools.run_all(calls)
        servers = [psutil.Process(one.pid) for one in set(tools._connections.values())]
        below = [child for server in servers for child in server.children(recursive=True)]
        assert below
    assert not [process for process in servers + below if process.is_running()]
