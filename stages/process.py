"""A stage's process: dies with its parent, runs once at a time, and stops when asked."""

import contextlib
import ctypes
import fcntl
import json
import os
import platform
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

PR_SET_PDEATHSIG = 1  # linux/prctl.h
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


class Stopped(Exception):
    """The stage was asked to stop and has written a checkpoint; the message says where it is."""


class Busy(RuntimeError):
    """Another process is running the same stage."""


class StopRequest:
    """Set by the first SIGTERM or SIGINT; a second one ends the process at once."""

    def __init__(self) -> None:
        self.requested = False

    def listen(self) -> None:
        """Take over SIGTERM and SIGINT from now on."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(number, signal.SIG_DFL)


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies, so that a killed run leaves no orphan.

    Elsewhere there is no such call; the stage's lock still keeps two of a kind from running.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the request took effect
        os.kill(os.getpid(), signal.SIGKILL)


def spin_briefly() -> None:
    """Let waiting threads sleep after some microseconds; to be called before torch is imported.

    libgomp's default spins for milliseconds. On an idle machine that gains 4 % in training; beside
    one busy process it takes the core from the thread that is waited for, and costs a factor of 3
    to 10. Never spinning (GOMP_SPINCOUNT=0) costs 30 % on an idle machine: benchmarks/overheads.py.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def keep_freed_memory() -> None:
    """Ask glibc to reuse large freed blocks instead of returning them to the system each time.

    Logits are hundreds of megabytes that come and go at every step; faulting their pages in anew
    cost up to 40 % of a stage's time (measured on `profile`).
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def peak_memory_bytes() -> int:
    """The most resident memory this process ever had.

    From /proc where there is one: getrusage's figure is inherited from the process that started
    this one, however little this one uses.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        (line,) = (ln for ln in status.read_text().splitlines() if ln.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextlib.contextmanager
def only_one(path: Path, node: str) -> Iterator[None]:
    """Hold a stage's lock, whose file tells the flow whom to signal; raises Busy."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            handle.seek(0)
            raise Busy(f"stage '{node}' is already running: {handle.read()}") from error
        handle.truncate(0)
        handle.write(json.dumps({"pid": os.getpid()}))
        handle.flush()
        try:
            yield
        finally:
            handle.truncate(0)
