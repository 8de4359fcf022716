"""The record in the lock's file: who holds it, in one block that is read whole or not at all."""

import os
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from flows.lock import RECORD_BYTES, Holder, PipelineLock


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / ".pipeline.lock"


def test_an_end_in_good_order_or_by_an_error_leaves_a_free_file(path):
    with PipelineLock(path, "first"):
        assert Holder.read(path).pid == os.getpid()
    assert path.read_text().startswith('{"state": "free"')
    with pytest.raises(ZeroDivisionError), PipelineLock(path, "second"):
        raise ZeroDivisionError
    assert Holder.read(path) is None
    with PipelineLock(path, "third") as lock:
        assert lock.previous is None


def test_a_reader_that_overlaps_a_write_never_takes_a_mixture_for_a_record(path):
    old = Holder(1111, 11, "boot", "host7", "anna", "old", "2025-03-04T12:00:00+00:00")
    new = Holder(2222, 22, "boot", "host7", "anna", "new", "2025-03-04T13:00:00+00:00")
    for cut in range(400):
        for before, after in ((old, new), (new, old)):
            path.write_bytes(before.encode()[:cut] + after.encode()[cut:])
            assert Holder.read(path) in (None, old, new)


def test_a_long_and_foreign_command_fits_the_record(path):
    with PipelineLock(path, "🦙\udcff\n" * 1000):
        assert path.stat().st_size == RECORD_BYTES
        assert Holder.read(path).command.startswith("🦙\udcff")


def test_a_holder_is_described_in_a_line():
    noon = datetime(2025, 3, 4, 12, 0, 0).astimezone()
    holder = Holder(4711, 1, "b", "host7", "anna", "./run_pipeline.sh", noon.isoformat())
    for later, expected in (
        (timedelta(seconds=40), "since 12:00:00 (40 s)"),
        (timedelta(minutes=12.9), "since 12:00:00 (12 min)"),
        (timedelta(hours=26), "since 2025-03-04 12:00:00 (26 h)"),
        (timedelta(seconds=-5), "since 12:00:00 (0 s)"),  # the clock was set back
    ):
        line = f"pid 4711 of anna on host7, {expected}: ./run_pipeline.sh"
        assert holder.describe(noon + later) == line
