"""Run one DVC stage in its own process group; stop it so that it can write a checkpoint."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from flows.plan import Node

GRACE_S = 90.0  # from asking a stage to stop until it is killed; a checkpoint takes seconds


class StageFailed(RuntimeError):
    """A stage ended badly; the message is its own reason in one line."""

    def __init__(self, node: str, reason: str, may_pass: bool) -> None:
        super().__init__(f"{node}: {reason}")
        self.may_pass = may_pass


class StageStopped(RuntimeError):
    """A stage was asked to stop and did, keeping its work."""


@dataclass(frozen=True)
class Outcome:
    """How a node came to have its output.

    state: "ran", "restored" (from DVC's run cache) or "reused" (nothing was to do).
    """

    node: Node
    state: str
    seconds: float = 0.0
    fingerprint: str | None = None


class StageRunner:
    """Runs stages, several at a time if asked to; `stop` ends them all in good order."""

    def __init__(
        self,
        root: Path,
        token: str,
        verbose: bool = False,
        checkpoint_every_s: float = 30.0,
        parallel: int = 1,
    ) -> None:
        self.root = root
        self.token = token
        self.verbose = verbose
        self.environment = {
            "NANOFOUNDRY_TOKEN": token,  # tells a stage of this run from an earlier one's traces
            "NANOFOUNDRY_CHECKPOINT_EVERY_S": str(checkpoint_every_s),
            # Stages at the same time share the cores.
            "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // parallel)),
        }
        self.stopping = threading.Event()

    def run(self, node: Node) -> Outcome:
        """Run `dvc repro` for one node; raises StageFailed or StageStopped."""
        if self.stopping.is_set():
            raise StageStopped(f"{node.name}: not started")
        began = time.monotonic()
        (self.root / "scratch" / node.name / "outcome.json").unlink(missing_ok=True)
        log = self.log_path(node)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as stream:
            code = self._wait(node, self._start(node, stream))
        outcome = self._outcome(node)
        seconds = time.monotonic() - began
        if outcome.get("token") != self.token:  # the stage itself was never started
            if code == 0:
                return Outcome(node, "restored", seconds)
            if self.stopping.is_set():
                raise StageStopped(f"{node.name}: not started")
            raise StageFailed(node.name, f"DVC failed; {last_lines(log)}", may_pass=False)
        if outcome["state"] == "done" and code == 0:
            self._drop_scratch(node, outcome["fingerprint"])
            return Outcome(node, "ran", seconds, outcome["fingerprint"])
        if outcome["state"] == "stopped":
            raise StageStopped(f"{node.name}: {outcome['reason']}")
        if outcome["state"] == "failed":
            raise StageFailed(node.name, outcome["reason"], outcome["retry"])
        if self.stopping.is_set() and outcome["state"] != "done":
            raise StageStopped(f"{node.name}: ended before its first checkpoint was due")
        if outcome["state"] == "done":
            raise StageFailed(node.name, f"DVC could not store the result; {last_lines(log)}", True)
        reason = "its process was killed, most likely because memory ran out"
        raise StageFailed(node.name, f"{reason}; {last_lines(log)}", may_pass=True)

    def stop(self) -> None:
        """Have all running stages write a checkpoint and end; returns at once."""
        self.stopping.set()  # whoever waits for a stage sees it

    def log_path(self, node: Node) -> Path:
        """Where the output of a node's DVC and stage goes."""
        return self.root / "scratch" / "logs" / f"{node.name}.log"

    def metrics_path(self, node: Node) -> Path | None:
        """The metrics.jsonl of the node's present work, if it has begun."""
        work = self._outcome(node).get("work")  # the stage says it once it knows its fingerprint
        path = self.root / "scratch" / node.name / str(work) / "metrics.jsonl"
        return path if work and path.is_file() else None

    def _start(self, node: Node, log) -> subprocess.Popen:
        dvc = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "-s", node.name]
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.child", *dvc],
            cwd=self.root,
            stdout=None if self.verbose else log,
            stderr=None if self.verbose else subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, **self.environment},
        )
        return process

    def _wait(self, node: Node, process: subprocess.Popen) -> int:
        asked: dict[int, float] = {}  # whom, and when
        while True:
            try:
                code = process.wait(timeout=0.2)
                break
            except subprocess.TimeoutExpired:
                if self.stopping.is_set():
                    self._ask_to_end(node, process, asked)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # whatever the stage left behind
        return code

    def _ask_to_end(self, node: Node, process: subprocess.Popen, asked: dict[int, float]) -> None:
        """SIGTERM once to the stage alone; SIGKILL to all at last.

        DVC must live on until the stage has ended, and then end by itself: killed while it
        releases its locks, it leaves a torn file that no other DVC starts on.
        """
        pid = self._stage_pid(node.name)
        with contextlib.suppress(ProcessLookupError):
            begun = self._outcome(node).get("token") == self.token
            if not begun and process.pid not in asked:
                os.killpg(process.pid, signal.SIGTERM)
            elif pid is not None and pid not in asked:
                os.kill(pid, signal.SIGTERM)
            asked.setdefault(pid or process.pid, time.monotonic())
            if time.monotonic() - min(asked.values()) > GRACE_S:
                os.killpg(process.pid, signal.SIGKILL)

    def _stage_pid(self, name: str) -> int | None:
        try:
            lock = self.root / "scratch" / name / "lock"
            outcome = self._read(self.root / "scratch" / name / "outcome.json")
            running = outcome.get("token") == self.token and outcome["state"] == "running"
            return json.loads(lock.read_text(encoding="utf-8"))["pid"] if running else None
        except (FileNotFoundError, json.JSONDecodeError):
            return None

    def _outcome(self, node: Node) -> dict:
        return self._read(self.root / "scratch" / node.name / "outcome.json")

    def _read(self, path: Path) -> dict:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def _drop_scratch(self, node: Node, fingerprint: str) -> None:
        """Delete the work of a node whose result dvc.lock now has; its log and curve were read."""
        finished = self.root / "scratch" / node.name / fingerprint[:16]
        kept = self.root / "scratch" / node.name / "last"
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir()
        for name in ("metrics.jsonl", "result.json"):
            if (finished / name).is_file():
                (finished / name).replace(kept / name)
        shutil.rmtree(finished)


def last_lines(log: Path, count: int = 6) -> str:
    """The end of a log, in one line, and where the rest is."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    end = " | ".join([line.strip() for line in lines if line.strip()][-count:])
    return f"{end} (all of it: {log})"
