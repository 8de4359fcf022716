"""The parent's end of the fork server: starts it, sends calls, and hands results to who waits.

The server is made by `exec`, so that it has nothing of this process: its environment holds where to
find modules, and a fixed seed for hashes (the order of a set is then the same in every run: results
are part of what a resumed training repeats). That is why it is not started with `-I`, which would
drop that seed; `-S -s -P` leave out the same folders, and nobody else writes its environment.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
from concurrent.futures import Future
from concurrent.futures import TimeoutError as Late
from contextlib import suppress
from pathlib import Path
from typing import Any

from runtime.tools import frames
from runtime.tools.calls import ToolResult

START_S = 120.0  # a cold import of sympy on a busy machine
GRACE_S = 5.0  # behind the deadline, after which the server itself is taken for hung
REPOSITORY = Path(__file__).resolve().parents[2]


class ServerDied(RuntimeError):
    """The server has ended, or does not answer; the message has what it wrote last."""


class CannotStart(RuntimeError):
    """The server does not come up: nothing that another try would change."""


class Connection:
    """One server process and the thread that reads its answers."""

    def __init__(self, module: str, settings: dict[str, Any]):
        self._link, theirs = socket.socketpair()
        self._errors = tempfile.TemporaryFile()
        settings = settings | {"link": theirs.fileno()}
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-s", "-P", "-B", "-m", module, json.dumps(settings)],
            env=_environment(),
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()
        self._lock = threading.Lock()
        self._waiting: dict[int, Future[ToolResult]] = {}
        self._ready: Future[dict[str, Any]] = Future()
        self.dead = False
        self._reader = threading.Thread(target=self._read, name="tool results", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """Process id of the server."""
        return self._process.pid

    def ready(self) -> dict[str, Any]:
        """What the server said of itself when it was ready. Raises CannotStart."""
        try:
            return self._ready.result(START_S)
        except Late:
            self._kill()
            raise CannotStart(f"the tool server was not ready within {START_S:g} s") from None

    def ask(self, number: int, tool: str, arguments: dict[str, Any]) -> "Future[ToolResult]":
        """Sends a call; its result comes in the future, or ServerDied."""
        given: Future[ToolResult] = Future()
        call = frames.pack({"id": number, "tool": tool, "arguments": arguments})
        with self._lock:
            self._waiting[number] = given
            try:
                if self.dead:
                    raise OSError
                self._link.sendall(call)
            except OSError:
                del self._waiting[number]
                given.set_exception(ServerDied(self._last_words()))
        return given

    def result(self, given: "Future[ToolResult]", seconds: float) -> ToolResult:
        """Waits for a result. Raises ServerDied, also for a server that no longer answers (it is
        killed), and CannotStart.

        As long as other results come in, the call waits for its turn.
        """
        self.ready()
        while True:
            before = len(self._waiting)
            try:
                return given.result(seconds + GRACE_S)
            except Late:
                if len(self._waiting) >= before and not given.done():
                    self._kill()
                    raise ServerDied("it did not answer in time") from None

    def close(self) -> None:
        """Ends the server and everything below it."""
        self.dead = True
        with suppress(OSError):
            self._link.shutdown(socket.SHUT_RDWR)
        try:
            self._process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            self._kill()
        self._reader.join(GRACE_S)
        self._link.close()
        self._errors.close()

    def _kill(self) -> None:
        self.dead = True
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _read(self) -> None:
        """Hands out answers until the link closes (a thread of its own)."""
        inbox = frames.Inbox()
        try:
            while (message := frames.receive(self._link.fileno(), inbox)) is not None:
                self._hand_out(message[0])
        except (OSError, frames.BadFrame, KeyError):
            self._kill()
        self.dead = True
        self._process.wait()
        death = ServerDied(self._last_words())
        with self._lock:
            lost, self._waiting = list(self._waiting.values()), {}
        for given in lost:
            given.set_exception(death)
        if not self._ready.done():
            self._ready.set_exception(CannotStart(f"the tool server cannot start: {death}"))

    def _hand_out(self, message: dict[str, Any]) -> None:
        if "ready" in message:
            self._ready.set_result(message["ready"])
            return
        with self._lock:
            given = self._waiting.pop(message["id"])
        error = message["error"]
        given.set_result(
            ToolResult(
                error is None,
                message["value"],
                error,
                round(message["seconds"], 6),
                message["truncated"],
            )
        )

    def _last_words(self) -> str:
        """The end of what the server wrote to its standard error."""
        with suppress(OSError, ValueError):
            self._errors.seek(0)
            lines = self._errors.read()[-2_000:].decode(errors="replace").strip().splitlines()
            if lines:
                return lines[-1][:300]
        return f"exit status {self._process.poll()}"


def _environment() -> dict[str, str]:
    """All that the server's environment holds."""
    packages = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    return {
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *packages]),
        "PYTHONHASHSEED": "0",
        "LC_ALL": "C.UTF-8",
    }
