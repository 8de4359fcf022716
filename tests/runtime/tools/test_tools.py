"""`Tools`: results in order, a log, servers that die and parents that do."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from runtime.tools.calls import BadCall, Call, find_call
from runtime.tools.connection import CannotStart
from runtime.tools.dispatch import Limits, Tools
from runtime.tools.sandbox import LAYERS
from tests.tiny import REPOSITORY

PY = ("py", "bash")


@pytest.fixture(scope="module")
def tools(tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "below" / "calls.jsonl"
    with Tools(PY, Limits(seconds=5.0, output_chars=200), log=log) as tools:
        if tools.refused:
            pytest.skip(f"this system cannot fence tools in: {tools.level}")
        tools.log_path = log
        yield tools


def py(code: str) -> Call:
    return Call("py", {"code": code}, f"<<py>>{code}")


def test_results_come_in_the_order_of_the_calls(tools) -> None:
    results = tools.run_all([py(f"{n} * 2") for n in range(12)])
    assert [result.value for result in results] == [2 * n for n in range(12)]


def test_threads_may_share_tools(tools) -> None:
    found = {}

    def ask(n: int) -> None:
        found[n] = [tools.run(py(f"{n} + {k}")).value for k in range(5)]

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert found == {n: [n + k for k in range(5)] for n in range(4)}


def test_nothing_is_left_for_the_next_call(tools) -> None:
    tools.run_all([py("x = 41"), py("import math\nlist = 3")])
    assert "NameError" in tools.run(py("x + 1")).error
    assert tools.run(py("list('ab')")).value == ["a", "b"]
    tools.run(Call("bash", {"command": "tee kept", "files": {"a/b": "x"}}, ""))
    for _ in range(4):
        assert tools.run(Call("bash", {"command": "find ."}, "")).value == "."


def test_the_order_of_a_set_is_the_same_in_every_server(tools) -> None:
    code = "print({'a', 'b', 'c', 'd', 'e', 'f'})"
    with Tools(("py",)) as others:
        assert others.run(py(code)).value == tools.run(py(code)).value


def test_a_bad_call_is_answered_without_running_anything(tools) -> None:
    bad = find_call("<<calk>>{}")
    assert isinstance(bad, BadCall)
    assert tools.run(bad).error == bad.error
    assert "no tool 'calc' here" in tools.run(Call("calc", {"expression": "1"}, "")).error
    assert "py needs 'code'" in tools.run(Call("py", {}, "")).error


def test_an_error_names_its_kind_and_line(tools) -> None:
    assert tools.run(py("x = 1\nx / 0")).error == "ZeroDivisionError: division by zero (line 2)"
    assert tools.run(py("1 +")).error.startswith("SyntaxError: Line 1")


def test_long_results_are_cut_and_say_so(tools) -> None:
    for code in ("'x' * 1000", "list(range(500))", "print('ä€' * 500)", "{'a': ['b' * 999]}"):
        result = tools.run(py(code))
        assert result.ok and result.truncated
        assert len(json.dumps(result.value, ensure_ascii=False)) <= 200
        assert result.value.endswith(" ...")
    assert not tools.run(py("'x' * 100")).truncated


def test_every_call_is_logged(tools) -> None:
    before = len(tools.log_path.read_text().splitlines())
    tools.run_all([py("'ä' + '\\ud800'"), BadCall("<<x>>", "no tool"), py("1 / 0")])
    lines = [json.loads(line) for line in tools.log_path.read_text().splitlines()[before:]]
    assert [line["tool"] for line in lines] == ["py", None, "py"]
    assert lines[0]["arguments"] == {"code": "'ä' + '\\ud800'"}
    assert lines[0]["value"] == "ä?" and lines[0]["seconds"] > 0
    assert lines[1]["text"] == "<<x>>" and lines[1]["error"] == "no tool"
    assert "ZeroDivisionError" in lines[2]["error"] and lines[2]["ok"] is False


def test_a_server_that_is_killed_is_started_again(tools) -> None:
    assert tools.run(py("1")).value == 1
    first = tools._connections["py"].pid
    os.kill(first, signal.SIGKILL)
    assert [result.value for result in tools.run_all([py("2"), py("3")])] == [2, 3]
    assert tools._connections["py"].pid != first


def test_a_server_that_is_stopped_is_replaced(monkeypatch) -> None:
    monkeypatch.setattr("runtime.tools.connection.GRACE_S", 1.0)
    with Tools(("py",), Limits(seconds=0.2)) as tools:
        assert tools.run(py("1")).value == 1
        os.kill(tools._connections["py"].pid, signal.SIGSTOP)
        assert tools.run(py("2")).value == 2


def test_a_server_that_cannot_start_is_no_result() -> None:
    with Tools(("py",), server="tests.runtime.tools.nothing") as tools:
        with pytest.raises(CannotStart, match="No module named tests.runtime.tools.nothing"):
            tools.run(py("1"))


def test_a_calculation_comes_out_the_same_every_time(calculator) -> None:
    """sympy tries identities at random places, and remembers."""
    call = Call("calc", {"expression": "simplify(sqrt(x^2+2x+1)-abs(x+1))"}, "")
    assert len({str(result.value) for result in calculator.run_all([call] * 6)}) == 1


def test_tools_are_used_inside_with() -> None:
    with pytest.raises(RuntimeError, match="with Tools"):
        Tools(PY).run(py("1"))
    with pytest.raises(ValueError, match="no tool 'sh'; there are calc, py, bash"):
        Tools(("sh",))
    with pytest.raises(ValueError, match="seconds is 0"):
        Limits(seconds=0)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_everything_ends_with_the_parent(how: int) -> None:
    code = """
import time
from runtime.tools.calls import Call
from runtime.tools.dispatch import Tools
with Tools(("py", "bash")) as tools:
    tools.run(Call("py", {"code": "1"}, ""))
    print("ready", flush=True)
    tools.run(Call("py", {"code": "while True: pass"}, ""))
"""
    command = [sys.executable, "-c", code]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    assert parent.stdout.readline() == "ready\n"
    time.sleep(0.1)
    below = psutil.Process(parent.pid).children(recursive=True)
    assert len(below) >= 3
    os.kill(parent.pid, how)
    parent.wait()
    parent.stdout.close()
    gone, alive = psutil.wait_procs(below, timeout=10)
    assert not alive


# --- what a system offers, and what it does not -------------------------------------------------


def test_the_level_names_every_layer(tools) -> None:
    named = [layer for layer in LAYERS if layer in tools.level.split("; missing")[0]]
    assert sorted(named) == sorted(tools.protection.layers)


def test_without_any_layer_only_the_calculator_runs() -> None:
    with Tools(layers=()) as tools:
        assert tools.run(Call("calc", {"expression": "12*34"}, "")).value == 408
        assert "the sandbox has no seccomp" in tools.run(py("1")).error
        refused = tools.run(Call("bash", {"command": "echo a"}, ""))
        assert "no seccomp and no landlock or namespaces" in refused.error
        assert set(tools.refused) == {"py", "bash"}
        assert tools.level.endswith("missing: " + ", ".join(LAYERS) + "; refused: py, bash")


def test_without_any_layer_the_rest_runs_when_that_is_asked_for() -> None:
    with Tools(PY, layers=(), unsafe=True) as tools:
        assert tools.run(py("1 + 1")).value == 2
        assert tools.run(Call("bash", {"command": "seq 3 | tac"}, "")).value == "3\n2\n1"
        assert "UNSAFE" in tools.level


READS = "result = os.read(os.open('/etc/passwd', os.O_RDONLY), 9)"


@pytest.mark.parametrize(
    ("layer", "code"),
    [
        ("seccomp", READS),
        ("seccomp", "os.fork(); result = 1"),
        ("landlock", READS),
        ("namespaces", READS),
        ("namespaces", "s = socket.create_connection(('127.0.0.1', PORT)); result = 1"),
        ("namespaces", "os.kill(VICTIM, 0); result = 1"),
        ("limits", "bytearray(1 << 32); result = 1"),
        ("limits", "os.fork(); result = 1"),
        ("user", "os.setuid(0); result = 1"),
    ],
)
def test_each_layer_holds_alone(layer: str, code: str) -> None:
    """One layer alone, but for `user`, as without it root's server has root's rights."""
    from tests.runtime.tools.world import World

    layers = ("user", layer)
    options = {"unsafe": True, "layers": layers, "server": "tests.runtime.tools.hostile"}
    with World() as world, Tools(("py",), Limits(memory_mb=512), **options) as tools:
        if layer in tools.protection.missing:
            pytest.skip(f"this system has no {layer}")
        result = tools.run(py(world.fill(code)))
    assert not result.value and not result.ok
