"""What a person sees while the pipeline runs: bars with time left, and a table at the end."""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table

from flows.plan import Node, read_metrics
from flows.stage_process import Outcome

PLAIN_EVERY_S = 20.0  # between lines where there is no terminal


@dataclass
class Estimate:
    """Seconds that nodes are expected to take: what they took last time, or the preset's figure."""

    expected_s: dict[str, float]
    began: dict[str, float] = field(default_factory=dict)
    took: dict[str, float] = field(default_factory=dict)

    @property
    def pace(self) -> float:
        """How much slower than expected this machine has been so far."""
        expected = sum(self.expected_s[name] for name in self.took)
        return max(0.25, min(4.0, sum(self.took.values()) / expected)) if expected else 1.0

    def left_s(self, name: str, measured: float | None) -> float:
        """Seconds that a running node still needs; `measured`: from its own steps, if known."""
        elapsed = time.monotonic() - self.began.get(name, time.monotonic())
        return max(self.expected_s[name] * self.pace - elapsed, measured or 0.0, 0.0)

    def all_left_s(self, running: dict[str, float | None], pending: set[str]) -> float:
        """Seconds until everything is done, stages one after the other."""
        waiting = sum(self.expected_s[name] * self.pace for name in pending)
        return waiting + sum(self.left_s(name, value) for name, value in running.items())


class ProgressView:
    """Follows the metrics.jsonl of running stages, and draws."""

    def __init__(
        self,
        console: Console,
        nodes: list[Node],
        estimate: Estimate,
        metrics_path: Callable[[Node], Path | None],
    ) -> None:
        self.console = console
        self.nodes = {node.name: node for node in nodes}
        self.estimate = estimate
        self.metrics_path = metrics_path
        self._pending = set(self.nodes)
        self._bars: dict[str, TaskID] = {}
        self._done = threading.Event()
        self._last_plain = 0.0
        self._seen: dict[str, list[dict]] = {}  # steps by node; its scratch is gone when it ends
        self._progress = Progress(
            TextColumn("{task.description:<24}"), BarColumn(bar_width=30),
            TextColumn("{task.percentage:>3.0f} %  {task.fields[note]}"), console=console,
        )  # fmt: skip
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> "ProgressView":
        if self.console.is_terminal:
            self._progress.start()
            self._total = self._progress.add_task("whole run", total=1.0, note="")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        if self.console.is_terminal:
            self._progress.stop()

    def started(self, node: Node) -> None:
        """A node has begun."""
        self.estimate.began[node.name] = time.monotonic()
        self._pending.discard(node.name)
        if self.console.is_terminal:
            self._bars[node.name] = self._progress.add_task(node.name, total=1.0, note="starting")
        else:
            self.console.print(f"{node.name}: started ({node.description})")

    def finished(self, outcome: Outcome, said: str) -> None:
        """A node has its output."""
        name = outcome.node.name
        self._pending.discard(name)
        if self.estimate.began.pop(name, None) is not None and outcome.state == "ran":
            self.estimate.took[name] = outcome.seconds
        if name in self._bars:
            self._progress.remove_task(self._bars.pop(name))
        self.console.print(f"{name}: {said}", highlight=False)

    def _follow(self) -> None:
        while not self._done.wait(0.5):
            running = {name: self._last_line(name) for name in list(self.estimate.began)}
            left = {name: _steps_left_s(line) for name, line in running.items()}
            total = self.estimate.all_left_s(left, self._pending)
            if self.console.is_terminal:
                self._draw(running, total)
            elif time.monotonic() - self._last_plain > PLAIN_EVERY_S:
                self._last_plain = time.monotonic()
                for name, line in running.items():
                    self.console.print(f"{name}: {_note(line)} | whole run: {duration(total)} left")

    def _draw(self, running: dict[str, list[dict]], total_left_s: float) -> None:
        done = sum(self.estimate.took.values()) + sum(
            time.monotonic() - began for began in list(self.estimate.began.values())
        )
        share = done / (done + total_left_s) if done else 0.0
        self._progress.update(self._total, completed=share, note=f"{duration(total_left_s)} left")
        for name, lines in running.items():
            if name in self._bars and lines:
                share = lines[-1]["step"] / lines[-1]["total"]
                self._progress.update(self._bars[name], completed=share, note=_note(lines))

    def _last_line(self, name: str) -> list[dict]:
        """The steps of the present phase, or those seen last where its curve is cleared away."""
        try:
            steps = read_steps(self.metrics_path(self.nodes[name]))
        except FileNotFoundError:
            steps = []
        if steps:
            self._seen[name] = [step for step in steps if step["phase"] == steps[-1]["phase"]]
        return self._seen.get(name, [])


def read_steps(path: Path | None) -> list[dict]:
    """The steps in a metrics.jsonl; a line that is not whole yet is left out."""
    if path is None:
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def _steps_left_s(steps: list[dict]) -> float | None:
    """Seconds until the phase is done, at the rate of its last steps."""
    recent = steps[-50:]
    if len(recent) < 2:
        return None
    rate = (recent[-1]["step"] - recent[0]["step"]) / max(
        recent[-1]["time_s"] - recent[0]["time_s"], 1e-6
    )
    return (recent[-1]["total"] - recent[-1]["step"]) / rate if rate > 0 else None


def _note(steps: list[dict]) -> str:
    """One line about where a stage is."""
    if not steps:
        return "starting"
    last = steps[-1]
    shown = {"phase", "step", "total", "time_s"}
    values = " ".join(f"{key} {value:.3g}" for key, value in last.items() if key not in shown)
    left = _steps_left_s(steps)
    time_left = f", {duration(left)} left" if left is not None else ""
    if last["step"] >= last["total"]:
        time_left = ", finishing"
    return f"{last['phase']} {last['step']}/{last['total']}{time_left}  {values}"


def duration(seconds: float) -> str:
    """Write a duration for people: "42 s", "3 min 20 s", "2 h 05 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def number(value: float) -> str:
    """Write a metric: whole numbers whole, others with four digits."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.4g}"


def plan_table(nodes: list[Node], chosen: list[Node], ledger: dict[str, Any]) -> Table:
    """What a run would do: each stage, run or reuse, why, how long and how much memory."""
    table = Table(title="plan", title_justify="left", expand=False)
    for column in ("stage", "would", "why", "time", "memory"):
        table.add_column(column, overflow="fold")
    names = {node.name for node in chosen}
    moving: set[str] = set()
    for node in nodes:
        behind = sorted(moving.intersection(node.upstream))
        if node.name not in names:
            would, why = "leave", "not asked for"
        elif node.reasons and not (behind and node.restorable):
            would = "restore" if node.restorable and not behind else "run"
            why = "; ".join(node.reasons[:3]) + (" ..." if len(node.reasons) > 3 else "")
            moving.add(node.name)
        elif behind:
            would, why = "run", f"if the output of {', '.join(behind)} changes"
            moving.add(node.name)
        else:
            would, why = "reuse", "nothing changed"
        known = ledger.get(node.name, {})
        table.add_row(
            node.name, would, why, known.get("time", "?"), known.get("memory", "?"),
            style={"run": "bold", "restore": "bold", "leave": "dim"}.get(would),
        )  # fmt: skip
    return table


def result_table(outcomes: list[Outcome], root: Path) -> Table:
    """What a run did: stage, time, run or reused, and the metric that stands for it."""
    table = Table(title="result", title_justify="left", expand=False)
    for column in ("stage", "time", "state", "headline metric"):
        table.add_column(column)
    for outcome in outcomes:
        node = outcome.node
        value = read_metrics(root, node).get(node.headline)
        headline = f"{node.headline} {number(value)}" if value is not None else ""
        seconds = duration(outcome.seconds) if outcome.state == "ran" else ""
        table.add_row(node.name, seconds, outcome.state, headline)
    return table
