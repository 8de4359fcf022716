"""Several processes by one command: it stops, dies, goes on and tells why as one process does."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml

from stages.__main__ import BAD_INPUT, DONE, FAILED, STOPPED
from stages.launch import _command, _one_outcome, _tell
from tests.stages.project import Project, make_project, wait_for
from tests.stages.tiny_dag import TinyDag, make_tiny_dag
from tests.tiny import REPOSITORY

CREWED = '''
"""Two processes that add up their numbers; $TROUBLE says what happens to the second one."""

import os
import signal
from dataclasses import dataclass

from stages.contract import Stage


@dataclass(frozen=True)
class Params:
    processes: int


def run(params, job):
    trouble = os.environ.get("TROUBLE")
    if trouble == "SIGKILL" and not job.leads:
        os.kill(os.getpid(), signal.SIGKILL)
    if trouble == "ValueError" and not job.leads:
        raise ValueError("as was asked")
    total = job.ranks.sums([float(job.ranks.index + 1)])[0]
    if job.leads:
        (job.output / "total.txt").write_text(repr(total))
    return {"total": total}


STAGE = Stage("crewed", Params, run)
'''
DONE_OUTCOME = {"state": "done", "token": "t", "fingerprint": "f"}
RUNNING = {"state": "running", "token": "t", "work": "w"}


def failed(reason: str, time_s: float) -> dict:
    return {"state": "failed", "token": "t", "reason": reason, "retry": False, "time_s": time_s}


# --- what is reported ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outcomes", "state", "reason"),
    [
        ([DONE_OUTCOME, DONE_OUTCOME], "done", None),
        ([failed("the cause", 1.0), failed("its echo", 2.0)], "failed", "the cause"),
        ([failed("echo", 2.0), failed("the cause", 1.0)], "failed", "process 1 of 2: the cause"),
        ([RUNNING, failed("the cause", 1.0)], "failed", "process 1 of 2: the cause"),
        ([RUNNING, RUNNING], "failed", "its processes were killed .accelerate.*exit code 1"),
        ([{}, {}], "failed", "its processes were killed"),
        ([{**RUNNING, "state": "stopped", "reason": "stopped at step 3"}, {}], "stopped", "step 3"),
    ],
)  # fmt: skip
def test_the_first_failure_is_the_reason(outcomes: list, state: str, reason: str | None) -> None:
    found = _one_outcome(outcomes, 1, was_stopped=False)
    assert found["state"] == state
    assert reason is None or re.search(reason, found["reason"])


def test_what_was_stopped_before_it_began_has_stopped() -> None:
    found = _one_outcome([RUNNING, {}], 1, was_stopped=True)
    assert found["state"] == "stopped" and found["token"] == "t"


@pytest.mark.parametrize("has_begun", [False, True])
def test_a_lock_left_by_a_kill_names_nobody_to_signal(tmp_path: Path, has_begun: bool) -> None:
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    agent, first = (subprocess.Popen(sleep) for _ in range(2))
    (tmp_path / "lock").write_text(json.dumps({"pid": first.pid}))
    if has_begun:
        (tmp_path / "outcome.json").write_text("{}")
    told: set[int] = set()
    _tell(tmp_path, agent.pid, told)
    asked, left = (first, agent) if has_begun else (agent, first)
    assert asked.wait(10) == -signal.SIGTERM and told == {asked.pid}
    assert left.poll() is None
    left.kill()
    left.wait()


def test_accelerate_launches_the_same_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "16")
    command = _command(["distill"], 4)
    assert command[1:3] == ["-m", "accelerate.commands.launch"]
    assert command[-3:] == ["--module", "stages", "distill"]
    assert command[command.index("--num_processes") + 1] == "4"
    assert command[command.index("--num_cpu_threads_per_process") + 1] == "4"


def test_another_number_of_processes_than_the_parameters_say_is_refused(tmp_path: Path) -> None:
    project = make_project(tmp_path)
    done = project.run("walk", RANK="0", WORLD_SIZE="2")
    assert done.returncode == BAD_INPUT
    assert "2 processes of stage 'walk' were started, but its parameters say 1" in done.stderr


# --- the whole of it -------------------------------------------------------------------------


@pytest.fixture
def crewed(tmp_path: Path) -> Project:
    """A project with one stage more, of two processes."""
    project = make_project(tmp_path / "project")
    folder = project.root / "stages/crewed"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "stage.py").write_text(CREWED)
    for name, section in (("dvc.yaml", "stages"), ("params.yaml", None)):
        path = project.root / name
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if section:
            content[section]["crewed"] = {
                "cmd": "python -m stages crewed", "deps": ["stages/crewed"], "params": ["crewed"],
                "outs": ["artifacts/crewed"],
                "metrics": [{"metrics/crewed.json": {"cache": False}}],
            }  # fmt: skip
        else:
            content["crewed"] = {"processes": 2}
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return project


def start(root: Path, stage: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "stages", stage],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "2", **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trouble", "code", "reason"),
    [
        ("", DONE, None),
        ("ValueError", FAILED, "process 1 of 2: as was asked"),
        ("SIGKILL", FAILED, ""),
    ],
)
def test_a_failure_of_one_ends_both_and_is_the_reason(
    crewed: Project, trouble: str, code: int, reason: str | None
) -> None:
    process = start(crewed.root, "crewed", TROUBLE=trouble)
    _, said = process.communicate(timeout=300)
    assert process.returncode == code, said
    outcome = crewed.outcome("crewed")
    if reason is None:
        assert outcome["state"] == "done"
        assert crewed.published()["artifacts/crewed/total.txt"] == b"3.0"
    else:
        assert outcome["state"] == "failed" and reason in outcome["reason"]
        assert said.rstrip().endswith(outcome["reason"])


@pytest.mark.slow
def test_killed_and_stopped_by_one_command_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, dag = (crew_dag(tmp_path / name, monkeypatch) for name in ("calm", "killed"))
    assert finish(expected) == DONE

    for number, step in ((signal.SIGKILL, 2), (signal.SIGTERM, 15)):
        process = start(dag.root, "distill", NANOFOUNDRY_CHECKPOINT_EVERY_S="0.05")
        wait_for_step(dag, process, step)
        below = psutil.Process(process.pid).children(recursive=True)
        assert len(below) >= 3  # accelerate's agent and two processes
        process.send_signal(number)
        process.communicate(timeout=300)
        assert process.returncode == (STOPPED if number == signal.SIGTERM else -number)
        _, alive = psutil.wait_procs(below, timeout=60)
        assert not alive
    outcome = json.loads((dag.root / "scratch/distill/outcome.json").read_text(encoding="utf-8"))
    assert outcome["state"] == "stopped" and "go on from there" in outcome["reason"]
    assert finish(dag) == DONE
    assert dag.published("distill") == expected.published("distill")


def crew_dag(root: Path, patch: pytest.MonkeyPatch) -> TinyDag:
    """The DAG up to distill, of two processes and enough steps to be interrupted."""
    dag = make_tiny_dag(root, patch)
    dag.run("extract")
    dag.set("distill", processes=2, batch_rows=4, steps=400, controls=[])
    return dag


def finish(dag: TinyDag) -> int:
    process = start(dag.root, "distill", NANOFOUNDRY_CACHE=str(dag.root / "cache"))
    process.communicate(timeout=500)
    return process.returncode


def wait_for_step(dag: TinyDag, process: subprocess.Popen, step: int) -> None:
    def has_come() -> bool:
        assert process.poll() is None, process.stderr.read()
        found = dag.root.glob("scratch/distill/*/checkpoints/student/step-*[0-9]")
        return any(int(path.name.removeprefix("step-")) >= step for path in found)

    for _ in range(10):  # half a minute each
        try:
            return wait_for(has_come, f"step {step}")
        except AssertionError:
            if process.poll() is not None:
                raise
    raise AssertionError(f"waited in vain for step {step}")
