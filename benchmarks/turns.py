"""Measure programs beside each other: a process each, which take their steps in turn.

What else the machine does then meets all of them alike. A side is a script that is started as

    SCRIPT NAME FOLDER

and answers on its standard output, each answer a line that begins with '> ': first what it is, then
for each number that it reads what a step took, as JSON (name -> number), and for "memory" its peak
resident bytes. `answer` does the side's part of that.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

from stages.process import peak_memory_bytes

PROJECT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}

Figures = dict[str, float]


def prepare(script: Path, folder: str) -> None:
    """Let a script make, in a folder, what its sides start from."""
    run = [sys.executable, str(script), "prepare", folder]
    subprocess.run(run, cwd=PROJECT, env=ENVIRONMENT, check=True)


def take_turns(
    script: Path, pythons: Mapping[str, str], folder: str, warm_up: int, rounds: int
) -> tuple[dict[str, list[Figures]], Figures]:
    """What each side's steps took, round by round, and its peak bytes.

    pythons: the interpreter of each side, by its name.
    """
    sides = {
        name: subprocess.Popen(
            [python, str(script), name, folder], cwd=PROJECT, env=ENVIRONMENT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        for name, python in pythons.items()
    }  # fmt: skip
    steps: dict[str, list[Figures]] = {name: [] for name in sides}
    for name, side in sides.items():
        print(f"{name}: {_answer_of(side, name)}", flush=True)
    for number in range(warm_up + rounds):
        for name, side in sides.items():
            figures = json.loads(_ask(side, name, str(number)))
            print(f"{number} {name}: {figures}", file=sys.stderr, flush=True)
            if number >= warm_up:
                steps[name].append(figures)
    memory = {name: float(_ask(side, name, "memory")) for name, side in sides.items()}
    for side in sides.values():
        side.stdin.close()
        side.wait()
    return steps, memory


def _ask(side: subprocess.Popen, name: str, question: str) -> str:
    side.stdin.write(question + "\n")
    side.stdin.flush()
    return _answer_of(side, name)


def _answer_of(side: subprocess.Popen, name: str) -> str:
    """The next answer, past whatever libraries print. Raises RuntimeError when the side ended."""
    for line in side.stdout:
        if line.startswith("> "):
            return line[2:].strip()
    raise RuntimeError(f"'{name}' ended with {side.wait()}; its error is above")


def report(steps: Mapping[str, list[Figures]], memory: Figures, rival: str, by: str) -> None:
    """A line a side: medians, and the median over rounds of the rival's `by` by this side's."""
    names = list(steps[rival][0])
    width = max(map(len, steps)) + 2
    print(" " * width + "".join(f"{name:>16}" for name in [*names, f"{rival} / this", "peak MB"]))
    for side, rounds in steps.items():
        columns = [median(figures[name] for figures in rounds) for name in names]
        pairs = zip(steps[rival], rounds, strict=True)
        ratio = median(theirs[by] / figures[by] for theirs, figures in pairs)
        numbers = [f"{number:.3f}" for number in (*columns, ratio)] + [f"{memory[side] / 1e6:,.0f}"]
        print(f"{side:<{width}}" + "".join(f"{number:>16}" for number in numbers), flush=True)


def answer(what: str, step: Callable[[int], Figures]) -> None:
    """A side's part: say what it is, then take the steps that it is asked for, to the end."""
    print(f"> {what}", flush=True)
    for line in sys.stdin:
        asked = line.strip()
        answered = peak_memory_bytes() if asked == "memory" else json.dumps(step(int(asked)))
        print(f"> {answered}", flush=True)


class Stopwatch:
    """Processor and wall seconds since it was made."""

    def __init__(self) -> None:
        self._processor, self._wall = time.process_time(), time.perf_counter()

    def read(self) -> tuple[float, float]:
        """Processor and wall seconds."""
        return time.process_time() - self._processor, time.perf_counter() - self._wall
