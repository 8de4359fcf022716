"""The three tools as the server runs them: what to load before, what to do, how often.

`warm` runs in the server, once: it imports, and makes sympy import, all that a call may need, for a
worker cannot open files any more. `run` runs in a worker.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.tools.sandbox import Limits, Protection


@dataclass(frozen=True)
class Room:
    """What a worker has: its scratch folder, and what it was shut in with."""

    scratch: Path
    protection: Protection
    limits: Limits


@dataclass(frozen=True)
class Runner:
    """A tool. run: (arguments, room) -> JSON value, and whether output was cut.

    calls: how many a worker serves. 1 where the model's own code runs in it; otherwise it is
    renewed now and then, for what sympy keeps in its caches.
    """

    warm: Callable[[], None]
    run: Callable[[dict[str, Any], Room], tuple[Any, bool]]
    calls: int


WARMING = (
    *("0.1+1/3", "sqrt(2)*x+1", "solve(x^2-4)", "solve([x+y=3,x-y=1])", "solve(x^3-x-1)"),
    *("diff(sin(x)*x^3,x)", "integrate(x^2*exp(x)+1/x,x)", "integrate(exp(-x^2),x,0,1)"),
    *("simplify(sin(x)^2+cos(x)^2)", "factor(x^3-1)", "factor(360)", "expand((x+1)^3)"),
    *("limit(sin(x)/x,x,0)", "sum(k^2,k,1,n)", "round(exp(1),3)", "log(100,10)", "isprime(97)"),
    *("solve(sin(x)=1/2)", "solve(2^x=8)", "integrate(sqrt(1-x^2),x,0,1)"),
    *("solve(sqrt(x)=3)", "solve(x*y=6,y)", "solve(log(x)=2)", "max(1,sqrt(5))", "cbrt(-8)"),
)


def _warm_calculator() -> None:
    from runtime.tools.calculator import calculate

    for expression in WARMING:
        calculate(expression)


def _run_calculator(arguments: dict[str, Any], room: Room) -> tuple[Any, bool]:
    from sympy.core.random import seed

    from runtime.tools.calculator import calculate

    seed(0)  # it tries identities at random places; the same call is to give the same value
    return calculate(arguments["expression"]), False


def _warm_python() -> None:
    from runtime.tools.python import run_program

    run_program("import math\nprint('%.2f' % math.pi, f'{1.5:.1f}')\nsorted({3: 'x'})")


def _run_python(arguments: dict[str, Any], room: Room) -> tuple[Any, bool]:
    from runtime.tools.python import run_program

    return run_program(arguments["code"])


def _warm_commands() -> None:
    import runtime.tools.commands  # noqa: F401
    from runtime.tools.shell import pipeline

    pipeline("seq 3 | cat")


def _run_commands(arguments: dict[str, Any], room: Room) -> tuple[Any, bool]:
    from runtime.tools.commands import run_commands

    return run_commands(arguments, room.scratch, room.protection, room.limits)


RUNNERS: dict[str, Runner] = {
    "calc": Runner(_warm_calculator, _run_calculator, calls=500),
    "py": Runner(_warm_python, _run_python, calls=1),
    "bash": Runner(_warm_commands, _run_commands, calls=500),
}


def cut(value: Any, most: int) -> tuple[Any, bool]:
    """A value whose JSON has at most `most` characters; a longer one as the start of its text."""
    text = json.dumps(value, ensure_ascii=False)
    if not text.isascii():  # half of a surrogate pair is no text that can be written anywhere
        value = json.loads(text.encode(errors="replace"))
    if len(text) <= most:
        return value, False
    start = (value if isinstance(value, str) else text)[: most // 2]
    while len(json.dumps(start, ensure_ascii=False)) > most - 4:
        start = start[: len(start) * 3 // 4]
    return start + " ...", True
