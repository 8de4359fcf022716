"""Extract on a disk that is full: said in one line, nothing published, the same bytes in the end.

The disk is a tmpfs of some megabytes, which only root may mount.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors import SafetensorError

from stages.__main__ import may_pass, reason_of
from tests.stages.project import DONE, FAILED, Project
from tests.stages.tiny_dag import TEACHER, TinyDag, make_tiny_dag

PAGE = 4096  # what a tmpfs gives out at a time
STEPS = 25  # three shards through eight blocks, and the end of their group


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "nanofoundry-test", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def dag(disk: Path, monkeypatch: pytest.MonkeyPatch) -> TinyDag:
    monkeypatch.setattr("stages.contract.CHECKPOINT_EVERY_S", 0.0)
    dag = make_tiny_dag(disk, monkeypatch)
    dag.set("extract", engine="streamed")
    return dag


def fill(disk: Path, left: int) -> Path:
    """Fill the disk up to so many pages; gives the file that does it."""
    ballast = disk / "ballast"
    free = shutil.disk_usage(disk).free
    ballast.write_bytes(bytes(free - left * PAGE))
    assert shutil.disk_usage(disk).free == left * PAGE
    return ballast


def undisturbed(dag: TinyDag) -> tuple[dict[str, bytes], int]:
    """What a whole run publishes, and how many pages it leaves; drops both."""
    before = shutil.disk_usage(dag.root).free
    dag.run("extract")
    published, after = dag.published("extract"), shutil.disk_usage(dag.root).free
    forget(dag)
    return published, (before - after) // PAGE


def forget(dag: TinyDag) -> None:
    for folder in ("scratch", "artifacts/extract", "metrics"):
        shutil.rmtree(dag.root / folder, ignore_errors=True)


def checkpoints(dag: TinyDag) -> list[str]:
    folders = dag.root.glob(f"scratch/extract@{TEACHER}/*/checkpoints/main/step-*")
    return sorted(folder.name for folder in folders)


def test_wherever_the_disk_gets_full_it_is_said_and_the_bytes_are_the_same_in_the_end(
    dag: TinyDag,
) -> None:
    """From no page left to nearly enough: shards, checkpoints, curves and results are cut off."""
    expected, taken = undisturbed(dag)
    begun = 0
    for left in range(0, taken, taken // 10):
        ballast = fill(dag.root, left)
        with pytest.raises((OSError, SafetensorError)) as caught:
            dag.run("extract")
        assert reason_of(caught.value).startswith("the disk is full"), caught.value
        assert not may_pass(caught.value)
        assert dag.published("extract") == {} and not (dag.root / "metrics").exists()
        ballast.unlink()
        begun += bool(checkpoints(dag))
        dag.run("extract")
        assert dag.published("extract") == expected, f"with {left} pages left"
        forget(dag)
    assert begun > 2  # some got far enough to go on from a checkpoint


def test_a_stage_that_filled_the_disk_goes_on_from_its_checkpoint(dag: TinyDag) -> None:
    expected, taken = undisturbed(dag)
    ballast = fill(dag.root, taken * 2 // 3)
    project = Project(dag.root)
    full = project.run("extract", TEACHER, NANOFOUNDRY_CHECKPOINT_EVERY_S="0")
    assert full.returncode == FAILED and "going on" not in full.stdout
    assert f"extract@{TEACHER}: the disk is full" in full.stderr
    assert "free some space and run it again, finished work is kept" in full.stderr
    assert dag.published("extract") == {}
    ballast.unlink()
    newest = [name for name in checkpoints(dag) if not name.endswith(".part")][-1]
    step = int(newest.removeprefix("step-"))
    assert 0 < step < STEPS
    done = project.run("extract", TEACHER, NANOFOUNDRY_CHECKPOINT_EVERY_S="0")
    assert done.returncode == DONE and f"going on from step {step} of main" in done.stdout
    assert dag.published("extract") == expected
    assert project.steps(f"extract@{TEACHER}") == list(range(1, STEPS + 1))
    assert not [name for name in checkpoints(dag) if name.endswith(".part")]
