"""The stage as a process: one at a time, no orphans, and a reason for every failure."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from stages.__main__ import may_pass, reason_of
from tests.stages.project import BAD_INPUT, DONE, FAILED, Project, checkpoints, wait_for
from tests.tiny import REPOSITORY

# --- the process -----------------------------------------------------------------------------


def test_a_second_process_of_the_same_stage_is_refused(project: Project) -> None:
    first = project.start("walk", TROUBLE="wait in step 2")
    try:
        wait_for(lambda: "step-00000001" in checkpoints(project), "step 1")
        second = project.run("walk")
        assert second.returncode == FAILED
        assert "'walk' is already running" in second.stderr and str(first.pid) in second.stderr
        assert project.published() == {}
    finally:
        first.kill()
        first.communicate()
    assert project.run("walk").returncode == DONE  # a lock does not outlive its holder


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is a call of Linux")
def test_a_stage_dies_with_its_parent(project: Project) -> None:
    parent = subprocess.Popen(
        ["sh", "-c", f"{sys.executable} -m stages walk; true"],
        cwd=project.root,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "TROUBLE": "wait in step 2"},
    )
    wait_for(lambda: "step-00000001" in checkpoints(project), "step 1")
    pid = json.loads((project.root / "scratch/walk/lock").read_text())["pid"]
    assert pid != parent.pid
    parent.kill()
    parent.wait()

    def is_gone() -> bool:
        status = Path(f"/proc/{pid}/stat")
        return not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"

    wait_for(is_gone, "the stage to die")


def test_a_token_of_the_caller_comes_back_in_the_outcome(project: Project) -> None:
    project.run("walk", NANOFOUNDRY_TOKEN="abc")
    outcome = project.outcome()
    assert outcome["token"] == "abc" and outcome["state"] == "done"
    assert outcome["fingerprint"].startswith(project.work()[-1].name)


def test_the_contract_needs_no_torch() -> None:
    code = "import sys, stages.__main__, stages.contract; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


# --- failures --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "retry", "code"),
    [
        ("MemoryError", True, FAILED),
        ("ConnectionError", True, FAILED),
        ("TimeoutError", True, FAILED),
        ("ValueError", False, BAD_INPUT),
        ("ZeroDivisionError", False, FAILED),
    ],
)
def test_a_failure_says_why_and_whether_to_try_again(
    project: Project, error: str, retry: bool, code: int
) -> None:
    done = project.run("walk", TROUBLE=f"{error} in step 3")
    outcome = project.outcome()
    assert done.returncode == code
    assert (outcome["state"], outcome["retry"]) == ("failed", retry)
    assert "as was asked" in outcome["reason"]
    assert outcome["reason"] in done.stderr


def test_a_bug_leaves_its_traceback_and_a_mistake_of_the_user_does_not(project: Project) -> None:
    assert "Traceback" in project.run("walk", TROUBLE="ZeroDivisionError in step 3").stderr
    assert "Traceback" not in project.run("walk", TROUBLE="ValueError in step 3").stderr


def test_a_full_disk_is_named(project: Project) -> None:
    done = project.run("walk", TROUBLE="ENOSPC in step 3")
    assert done.returncode == FAILED
    reason = project.outcome()["reason"]
    assert "disk is full" in reason and "walk.npy" in reason
    assert not project.outcome()["retry"]


@pytest.mark.parametrize(
    "error",
    [
        # as numpy and safetensors say it, measured on a full file system
        OSError("100000 requested and 8176 written"),
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
    ],
)
def test_a_full_disk_is_named_however_a_library_says_it(error: Exception) -> None:
    assert "disk is full" in reason_of(error)


def test_memory_that_torch_could_not_get_is_named_and_may_be_there_later() -> None:
    error = RuntimeError(  # as torch says it on a CPU
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 4611686018427387904 bytes. Error code 12 (Cannot allocate memory)"
    )
    assert "out of memory" in reason_of(error)
    assert may_pass(error)


@pytest.mark.parametrize(
    ("package", "name"),
    [
        ("requests", "ConnectionError"),
        ("requests", "ReadTimeout"),
        ("httpx", "ConnectError"),
        ("httpx", "ReadError"),
        ("httpx", "ConnectTimeout"),
    ],
)
def test_a_lost_network_may_come_back_whatever_library_lost_it(package: str, name: str) -> None:
    error = getattr(pytest.importorskip(package), name)("as was asked")
    assert may_pass(error)


def test_a_reason_is_one_line() -> None:
    assert reason_of(ValueError("first\n  second")) == "first second"
    assert reason_of(KeyError("a\nb")).count("\n") == 0
    assert reason_of(MemoryError("a\nb")).count("\n") == 0


def test_an_unknown_teacher_is_refused_by_name(project: Project) -> None:
    project.run("walk")
    assert project.run("view", "ada").returncode == DONE
    done = project.run("view", "adda")
    assert done.returncode == BAD_INPUT, done.stderr
    assert "Traceback" not in done.stderr and "ada, ben" in done.stderr


def test_check_refuses_a_mistake_in_any_section(project: Project) -> None:
    assert project.run("--check").returncode == DONE
    project.set("total", oppens="walk")
    done = project.run("--check")
    assert done.returncode == BAD_INPUT
    assert "section 'total'" in done.stderr and "'oppens'" in done.stderr
