"""Run a stage in several processes by `accelerate launch`, as one stage to whoever started it.

    python -m stages distill                        this process; waits, passes signals on, reports
      accelerate launch --num_processes 2 ...       torchrun's agent; ends all when one fails
        python -m stages distill                    the first: holds the lock, writes, publishes
        python -m stages distill                    the others: compute

Each dies with its parent. A signal goes to the first process alone, which has the others stop with
it (Job.step_done): the agent would kill them all after 30 seconds, and a Ctrl-C of the terminal
would reach everyone twice, which is why the agent has a session of its own. Why a stage failed is
what failed first: the others then fail as well, for want of the one that is gone.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from stages.process import StopRequest, die_with_parent


def outcome_path(folder: Path, rank: int) -> Path:
    """Where a process says how it ended: scratch/NODE/outcome.json, outcome-1.json, ..."""
    return folder / ("outcome.json" if rank == 0 else f"outcome-{rank}.json")


def launch(arguments: list[str], processes: int, folder: Path, stop: StopRequest) -> dict[str, Any]:
    """Run `python -m stages ARGUMENTS` in so many processes; give the outcome of them all.

    folder: scratch/NODE.
    """
    for rank in range(processes):
        outcome_path(folder, rank).unlink(missing_ok=True)
    agent = subprocess.Popen(
        _command(arguments, processes), start_new_session=True, preexec_fn=die_with_parent
    )
    told: set[int] = set()
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = agent.wait(timeout=0.2)
            break
        if stop.requested and not told:
            _tell(folder, agent.pid, told)
    outcomes = [_read(outcome_path(folder, rank)) for rank in range(processes)]
    return _one_outcome(outcomes, code, bool(told))


def _command(arguments: list[str], processes: int) -> list[str]:
    """The call of accelerate; all that a configuration file of the user's could change is said."""
    cores = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    options = {
        "num_processes": processes,
        "num_machines": 1,
        "mixed_precision": "no",  # the student's own type is what is computed in
        "dynamo_backend": "no",
        "main_process_port": 0,  # any that is free
        "num_cpu_threads_per_process": max(1, cores // processes),
    }
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    accelerate = [sys.executable, "-m", "accelerate.commands.launch"]
    # --multi_gpu is its word for torchrun; without a GPU the processes meet by gloo all the same.
    return [*accelerate, "--multi_gpu", *flags, "--module", "stages", *arguments]


def _tell(folder: Path, agent: int, told: set[int]) -> None:
    """SIGTERM to the first process, or, before there is one, to the agent."""
    pid = agent
    if outcome_path(folder, 0).is_file():  # else the lock may still name one that was killed
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            pid = json.loads((folder / "lock").read_text(encoding="utf-8"))["pid"]
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    told.add(pid)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _one_outcome(outcomes: list[dict[str, Any]], code: int, was_stopped: bool) -> dict[str, Any]:
    """What is to be reported of a stage whose processes ended so, the agent with an exit code."""
    failed = [(found["time_s"], rank) for rank, found in enumerate(outcomes) if "retry" in found]
    first = outcomes[0]
    if failed:
        rank = min(failed)[1]
        whose = f"process {rank} of {len(outcomes)}: " if rank else ""
        return {**first, **outcomes[rank], "reason": whose + outcomes[rank]["reason"]}
    if first.get("state") in ("done", "stopped"):
        return first
    if was_stopped:
        return {**first, "state": "stopped", "reason": "stopped before its first step"}
    reason = (
        f"its processes were killed (accelerate ended with exit code {code}), most likely because "
        "memory ran out"
    )
    return {**first, "state": "failed", "reason": reason, "retry": True}
