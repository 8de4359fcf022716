"""A stage's progress: one JSON line a step in metrics.jsonl.

A stage does not import mlflow (seconds of import); it appends here, and the flow sends the lines
to MLflow and draws the bar. Because a resumed stage cuts the file back to its checkpoint, the
whole curve is there once, from the first step, however often the stage was interrupted.
"""

import json
import sys
import time
from pathlib import Path


class Progress:
    """Appends steps to metrics.jsonl and, run by hand in a terminal, shows a line."""

    def __init__(self, path: Path, title: str) -> None:
        self.path = path
        self.title = title
        self._stream = path.open("a", encoding="utf-8")
        self._started: tuple[float, int] | None = None
        self._terminal = sys.stderr.isatty()

    def cut_back(self, phase: str, step: int) -> None:
        """Forget the steps of a phase behind `step`: they are going to be done again."""
        self._stream.close()
        lines = [line for line in self.path.read_text(encoding="utf-8").splitlines() if line]
        part = self.path.with_suffix(".part")
        kept = [line for line in lines if not _is_behind(line, phase, step)]
        part.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        part.replace(self.path)
        self._stream = self.path.open("a", encoding="utf-8")

    def add(self, phase: str, step: int, total: int, metrics: dict[str, float]) -> None:
        """Record that `step` of `total` is done."""
        now = time.time()
        line = {"phase": phase, "step": step, "total": total, "time_s": round(now, 3), **metrics}
        self._stream.write(json.dumps(line) + "\n")
        self._stream.flush()
        if self._started is None:
            self._started = (now, step)
        if self._terminal:
            self._show(line, now)

    def _show(self, line: dict, now: float) -> None:
        began, first = self._started or (now, line["step"])
        rate = (line["step"] - first) / (now - began) if now > began else 0.0
        left = f"{(line['total'] - line['step']) / rate:.0f} s left" if rate else ""
        shown = {"phase", "step", "total", "time_s"}
        values = "  ".join(f"{key} {value:.4g}" for key, value in line.items() if key not in shown)
        end = "\n" if line["step"] == line["total"] else "\r"
        text = f"{self.title} {line['phase']} {line['step']}/{line['total']}  {values}  {left}"
        sys.stderr.write(f"{text:<110}{end}")
        sys.stderr.flush()


def _is_behind(line: str, phase: str, step: int) -> bool:
    """Whether a line is of a phase and behind a step; a line torn by a kill counts as such."""
    try:
        entry = json.loads(line)
    except json.JSONDecodeError:
        return True
    return entry["phase"] == phase and entry["step"] > step
