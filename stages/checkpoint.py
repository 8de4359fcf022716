"""Checkpoints: folders that are either whole or ignored.

A checkpoint is written to `NAME.part`, given a manifest of checksums, synced and renamed. The last
two are kept: when the newest turns out to be torn or damaged, the one before it is used, and said.
"""

import os
import shutil
from pathlib import Path
from typing import Protocol

from stages.digests import Damaged, verify_manifest, write_manifest

KEEP = 2


class Resumable(Protocol):
    """Something that can be written to a folder and read back, to the bit."""

    def save(self, folder: Path) -> None:
        """Write all of it as files into an empty folder."""

    def load(self, folder: Path) -> None:
        """Take over what `save` wrote."""


def save_checkpoint(state: Resumable, folder: Path, step: int) -> None:
    """Write `folder/step-00000120`, whole or not at all, and drop all but the last two."""
    target = folder / f"step-{step:08d}"
    part = target.with_suffix(".part")
    for torn in folder.glob("step-*.part"):  # of a kill or a full disk, at whatever step
        shutil.rmtree(torn)
    part.mkdir(parents=True)
    state.save(part)
    write_manifest(part)
    for path in part.iterdir():
        _sync(path)
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)
    _sync(folder)
    for old in sorted(folder.glob("step-*[0-9]"))[:-KEEP]:
        shutil.rmtree(old)


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """Find the newest intact checkpoint, and what was wrong with newer ones."""
    problems = []
    for path in sorted(folder.glob("step-*[0-9]"), reverse=True):
        try:
            verify_manifest(path, "it is passed over for the checkpoint before it")
            return path, problems
        except Damaged as damage:
            problems.append(str(damage))
    return None, problems


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint folder was written at."""
    return int(checkpoint.name.removeprefix("step-"))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
