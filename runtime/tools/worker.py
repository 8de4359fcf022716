"""A worker: a child of the fork server that shuts itself in and then answers calls.

It has one file, its socket to the server; standard input, output and error lead nowhere.
"""

import os
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

from runtime.tools import frames
from runtime.tools.kernel import fork_into
from runtime.tools.namespaces import NEW_PROCESSES
from runtime.tools.runners import RUNNERS, Room
from runtime.tools.sandbox import confine, confine_computing

Answer = Callable[[str, dict[str, Any], Room], dict[str, Any]]  # tool, arguments, room -> message

LONGEST_ERROR = 500  # characters
BYTES_PER_LETTER = 12  # at most, in JSON of ASCII: a surrogate pair, escaped

_NUMBERS = count()


@dataclass(eq=False)
class Worker:
    """A worker as the server sees it."""

    pid: int
    socket: socket.socket
    tool: str
    scratch: Path | None
    calls: int = 0
    inbox: frames.Inbox = field(default_factory=frames.Inbox)


def start(tool: str, room: Room, used: int, answer: Answer) -> Worker:
    """Forks a worker of a tool. One that runs commands gets a folder of its own in `room.scratch`.

    used: bytes of address space that the server has. answer: what it does with each call.
    """
    ours, theirs = socket.socketpair()
    own = None
    if tool == "bash":
        own = room.scratch / str(next(_NUMBERS))
        own.mkdir(mode=0o700)
    apart = "namespaces" in room.protection.layers
    pid = fork_into(NEW_PROCESSES) if apart else os.fork()
    if pid == 0:
        try:
            inside = replace(room, scratch=own or room.scratch)
            confine(room.protection, room.limits, tool, inside.scratch, used, RUNNERS[tool].calls)
            file = _only(theirs.fileno())
            if tool != "bash":
                confine_computing(room.protection)
            _work(file, tool, inside, answer)
        finally:
            os._exit(70)
    theirs.close()
    longest = BYTES_PER_LETTER * (room.limits.output_chars + 2 * LONGEST_ERROR)
    return Worker(pid, ours, tool, own, inbox=frames.Inbox(longest))


def end(worker: Worker) -> int:
    """Kills a worker with all that it started, and gives its exit status."""
    worker.socket.close()
    with suppress(ProcessLookupError, PermissionError):  # before it has a group of its own
        os.killpg(worker.pid, signal.SIGKILL)
    os.kill(worker.pid, signal.SIGKILL)  # not reaped yet, so that it is still this worker
    return os.waitpid(worker.pid, 0)[1]


def _only(file: int) -> int:
    """Closes every file but one, which becomes file 3; 0, 1 and 2 lead nowhere."""
    kept = os.dup2(file, 60)
    nowhere, _ = os.pipe()
    for standard in range(3):
        os.dup2(nowhere, standard)
    os.dup2(kept, 3)
    os.closerange(4, 65_536)
    return 3


def _work(file: int, tool: str, room: Room, answer: Answer) -> None:
    """Answers calls until the server closes the socket."""
    inbox = frames.Inbox()
    while (message := frames.receive(file, inbox)) is not None:
        arguments, nonce = message
        frames.send(file, frames.pack(answer(tool, arguments, room), nonce))
