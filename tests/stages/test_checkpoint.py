"""Checkpoints: whole or passed over, never half."""

import errno
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from stages.checkpoint import newest_checkpoint, save_checkpoint
from tests.stages.project import DONE, Counter, Project, assert_same_result


def truncate(checkpoint: Path) -> None:
    file = checkpoint / "position.npy"
    file.write_bytes(file.read_bytes()[:-9])


def flip_a_bit(checkpoint: Path) -> None:
    file = checkpoint / "position.npy"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def lose_a_file(checkpoint: Path) -> None:
    (checkpoint / "position.npy").unlink()


def lose_the_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


def tear_the_manifest(checkpoint: Path) -> None:
    file = checkpoint / "manifest.json"
    file.write_bytes(file.read_bytes()[:-9])


def scramble_the_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").write_bytes(b"\xff\xfe\x80 not text")


def empty_the_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").write_bytes(b"")


DAMAGES = [
    truncate,
    flip_a_bit,
    lose_a_file,
    lose_the_manifest,
    tear_the_manifest,
    scramble_the_manifest,
    empty_the_manifest,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it(
    project: Project, undisturbed: Project, damage: Callable[[Path], None]
) -> None:
    project.run("walk", TROUBLE="SIGKILL in step 6")
    (newest,) = project.root.glob("scratch/walk/*/checkpoints/main/step-00000005")
    damage(newest)
    done = project.run("walk")
    assert done.returncode == DONE, done.stderr
    assert "damaged checkpoint" in done.stdout and "step-00000005" in done.stdout
    assert "going on from step 4" in done.stdout
    assert_same_result(project, undisturbed)


def test_without_an_intact_checkpoint_a_stage_starts_over(
    project: Project, undisturbed: Project
) -> None:
    project.run("walk", TROUBLE="SIGKILL in step 6")
    found = list(project.root.glob("scratch/walk/*/checkpoints/main/step-*"))
    assert len(found) == 2
    for checkpoint in found:
        truncate(checkpoint)
    done = project.run("walk")
    assert done.stdout.count("damaged checkpoint") == 2
    assert_same_result(project, undisturbed)


def test_only_the_last_two_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10, 100):
        save_checkpoint(Counter(), tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000100"]


def test_a_checkpoint_that_was_never_renamed_does_not_count(tmp_path: Path) -> None:
    save_checkpoint(Counter(), tmp_path, 1)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000002.part")
    found, problems = newest_checkpoint(tmp_path)
    assert found == tmp_path / "step-00000001" and problems == []


def test_a_state_that_cannot_be_saved_leaves_the_checkpoint_before_it(tmp_path: Path) -> None:
    class Broken(Counter):
        def save(self, folder: Path) -> None:
            super().save(folder)
            raise OSError(errno.ENOSPC, "No space left on device")

    save_checkpoint(Counter(), tmp_path, 1)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(Broken(), tmp_path, 2)
    assert newest_checkpoint(tmp_path) == (tmp_path / "step-00000001", [])
    save_checkpoint(Counter(), tmp_path, 2)  # what it left behind is not in the way
    assert newest_checkpoint(tmp_path) == (tmp_path / "step-00000002", [])


def test_what_a_torn_checkpoint_left_takes_no_room_once_there_is_another(tmp_path: Path) -> None:
    (tmp_path / "step-00000001.part").mkdir()
    (tmp_path / "step-00000001.part" / "count.txt").write_text("1")
    save_checkpoint(Counter(), tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]
