"""Run one stage: python -m stages NAME [TEACHER].

DVC calls this (the `cmd` of each stage in dvc.yaml); a person may call it too. Whatever happens,
scratch/NODE/outcome.json says it in one line, because DVC's exit code is 255 for everything.

    python -m stages --check [FILE]   check every section of params.yaml (or FILE) and stop
"""

import contextlib
import importlib
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stages.contract import Job, Stage, write_json
from stages.declaration import read_declaration
from stages.launch import launch, outcome_path
from stages.params import read_params_file, read_section
from stages.process import (
    Busy,
    Stopped,
    StopRequest,
    die_with_parent,
    keep_freed_memory,
    only_one,
    peak_memory_bytes,
    spin_briefly,
)
from stages.ranks import announced, join_ranks

ROOT = Path.cwd()
DONE, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 3

# How libraries say that a disk is full, that memory ran out, that the network went away: few use
# the builtin exceptions, and some only the message.
DISK_FULL = ("no space left on device", "requested and")  # the second: numpy's short write
MEMORY = ("outofmemoryerror", "memoryerror", "can't allocate memory", "out of memory")
NETWORK = (
    "connectionerror", "connecterror", "readerror", "timeout", "name resolution",
    "offlinemodeisenabled", "localentrynotfounderror",
)  # fmt: skip


def main(arguments: list[str]) -> int:
    """Run the stage named on the command line; give an exit code."""
    if arguments[:1] == ["--check"]:
        return check_all_params(Path(arguments[1]) if arguments[1:] else ROOT / "params.yaml")
    if not 1 <= len(arguments) <= 2:
        print(__doc__, file=sys.stderr)
        return BAD_INPUT
    die_with_parent()
    keep_freed_memory()
    spin_briefly()
    stop = StopRequest()
    stop.listen()
    name, item = arguments[0], (arguments[1:] or [None])[0]
    node = name if item is None else f"{name}@{item}"
    outcome = {"token": os.environ.get("NANOFOUNDRY_TOKEN", ""), "state": "running"}
    folder = ROOT / "scratch" / node
    rank, ranks = announced()
    report = outcome_path(folder, rank)
    try:
        processes = processes_of(name, item)
        if ranks == 1 < processes:
            return report_of(launch(arguments, processes, folder, stop), node, report)
        with only_one(folder / "lock", node) if rank == 0 else contextlib.nullcontext():
            write_json(report, outcome)
            fingerprint = run_stage(
                name,
                item,
                stop,
                lambda job: write_json(report, outcome | {"work": job.folder.name}),
            )
        outcome |= {"state": "done", "fingerprint": fingerprint}
        code = DONE
    except Stopped as stopped:
        outcome |= {"state": "stopped", "reason": str(stopped)}
        code = STOPPED if ranks == 1 else DONE  # else the launcher would take it for a failure
    except (
        Exception,
        KeyboardInterrupt,
    ) as error:  # the door: every failure is reported, none lost
        outcome |= {"state": "failed", "reason": reason_of(error), "retry": may_pass(error)}
        outcome["time_s"] = time.time()
        if not isinstance(error, (ValueError, FileNotFoundError, Busy)):
            traceback.print_exc()
        code = BAD_INPUT if isinstance(error, (ValueError, FileNotFoundError)) else FAILED
    write_outcome(report, outcome)
    if code != DONE:
        print(f"{node}: {outcome['reason']}", file=sys.stderr)
    return code


def processes_of(name: str, item: str | None) -> int:
    """In how many processes a stage is to run, by its parameters; checks them on the way.

    Raises ValueError where a launcher has started another number of them.
    """
    read_declaration(ROOT, name, item)
    params = read_section(ROOT / "params.yaml", name, find_stage(name).params)
    wanted, (_, there) = getattr(params, "processes", 1), announced()
    if there not in (1, wanted):
        raise ValueError(
            f"{there} processes of stage '{name}' were started, but its parameters say {wanted}; "
            f"set {name}.processes where the stage has it, and run python -m stages {name}"
        )
    return wanted


def report_of(outcome: dict[str, Any], node: str, report: Path) -> int:
    """Leave the outcome of several processes where that of one would be; give the exit code."""
    write_outcome(report, outcome)
    if outcome["state"] == "done":
        return DONE
    print(f"{node}: {outcome['reason']}", file=sys.stderr)
    return STOPPED if outcome["state"] == "stopped" else outcome.get("code", FAILED)


def run_stage(
    name: str, item: str | None, stop: StopRequest, on_begin: Callable[[Job], None]
) -> str:
    """Run a stage and publish its output; give its fingerprint."""
    declaration = read_declaration(ROOT, name, item)
    stage = find_stage(name)
    params = read_section(ROOT / "params.yaml", name, stage.params)
    ranks = join_ranks()
    job = Job(ROOT, declaration, stop, ranks)
    on_begin(job)
    if job.is_complete():
        job.say("was complete before; publishing it again")
    else:
        began, cpu = time.monotonic(), time.process_time()
        metrics = stage.run(params, job)
        if job.leads:
            job.complete(metrics, usage_since(began, cpu))
    if job.leads:
        job.publish()
    ranks.leave()
    return job.fingerprint


def find_stage(name: str) -> Stage:
    """Import stages/NAME/stage.py and give its STAGE."""
    return importlib.import_module(f"stages.{name}.stage").STAGE


def check_all_params(file: Path) -> int:
    """Build every stage's parameters from a params file, before anything costs anything."""
    known = {path.parent.name for path in (ROOT / "stages").glob("*/stage.py")}
    try:
        stages = [find_stage(name) for name in read_params_file(file) if name in known]
        sections = {stage.name: read_section(file, stage.name, stage.params) for stage in stages}
        for stage in stages:
            if stage.check_among:
                stage.check_among(sections)
    except ValueError as error:
        print(error, file=sys.stderr)
        return BAD_INPUT
    return DONE


def usage_since(began_s: float, cpu_s: float) -> dict[str, float]:
    """Wall seconds, core-seconds and the peak of resident memory of this process."""
    return {
        "wall_s": round(time.monotonic() - began_s, 2),
        "cpu_s": round(time.process_time() - cpu_s, 2),
        "peak_memory_gib": round(peak_memory_bytes() / 2**30, 3),
    }


def reason_of(error: BaseException) -> str:
    """One line: what is wrong and, where it is known, what to do."""
    said = " ".join(f"{type(error).__name__}: {error}".split())
    if is_kind(error, DISK_FULL):
        return f"the disk is full ({said}); free some space and run it again, finished work is kept"
    if is_kind(error, MEMORY):
        return f"out of memory ({said}); close other programs or take a smaller preset"
    if isinstance(error, (ValueError, FileNotFoundError, Busy, ConnectionError)):
        return " ".join(str(error).split())
    return said


def may_pass(error: BaseException) -> bool:
    """Whether the same call may succeed later without anybody changing anything."""
    return is_kind(error, MEMORY) or is_kind(error, NETWORK)


def is_kind(error: BaseException | None, signs: tuple[str, ...]) -> bool:
    """Whether an error, or what caused it, shows one of the signs in its types or its message."""
    while error is not None:
        types = " ".join(kind.__name__ for kind in type(error).__mro__)
        if any(sign in f"{types} {error}".lower() for sign in signs):
            return True
        error = error.__cause__
    return False


def write_outcome(path: Path, outcome: dict[str, Any]) -> None:
    """Leave the outcome for the flow; on a full disk the exit code has to do."""
    try:
        write_json(path, outcome)
    except OSError as error:
        print(f"{path} could not be written: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
