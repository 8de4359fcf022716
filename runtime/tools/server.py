"""The fork server: takes calls, hands each to a worker, and kills the worker at the deadline.

One thread, one loop, so that forking is safe. Workers are forked ahead of time and wait, shut in
already, for their first call; a spare one is made when there is nothing else to do. Everything that
a worker sends is bounded, checked, and counts only with the nonce of the call that it was given.

The server ends when its parent does: the link closes, or the parent's process id changes.
"""

import json
import os
import secrets
import selectors
import shutil
import socket
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

from runtime.tools import frames
from runtime.tools.runners import RUNNERS, Room
from runtime.tools.worker import LONGEST_ERROR, Answer, Worker, end, start

IDLE_S = 1.0  # how often an idle server looks for its parent
MOST_STILLBORN = 5  # workers in a row that end before their first call


@dataclass
class Job:
    """A call that runs or waits."""

    number: int
    tool: str
    arguments: dict[str, Any]


@dataclass
class Running:
    """A job and when its time is up (monotonic seconds)."""

    job: Job
    nonce: bytes
    began: float
    deadline: float


@dataclass
class Server:
    """Workers, jobs, and the link to the parent."""

    link: socket.socket
    room: Room  # what its workers have
    used: int  # bytes of address space before any call
    names: tuple[str, ...]
    refused: dict[str, str]  # tool -> why it does not run here
    answer: Answer
    inbox: frames.Inbox = field(default_factory=frames.Inbox)
    waiting: deque[Job] = field(default_factory=deque)
    running: dict[Worker, Running] = field(default_factory=dict)
    idle: dict[str, list[Worker]] = field(default_factory=dict)
    stillborn: Counter[str] = field(default_factory=Counter)
    selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)

    def serve(self) -> None:
        """Answers calls until the parent has gone; then ends every worker."""
        parent = os.getppid()
        self.selector.register(self.link, selectors.EVENT_READ)
        self.idle = {name: [] for name in self.names if name not in self.refused}
        try:
            while os.getppid() == parent and self._turn():
                pass
        finally:
            for worker in [*self.running, *sum(self.idle.values(), [])]:
                end(worker)

    def _turn(self) -> bool:
        """Waits for the next thing to happen and does it; False: the link is closed."""
        events = self.selector.select(self._patience())
        for key, _ in events:
            if key.fileobj is self.link:
                if not self._read_link():
                    return False
            elif key.data in self.running:
                self._read_worker(key.data)
            else:
                self._lose(key.data)
        now = time.monotonic()
        for worker, running in list(self.running.items()):
            if now >= running.deadline:
                self._finish(
                    worker, error=f"stopped after {self.room.limits.seconds:g} s: too slow"
                )
        while self.waiting and len(self.running) < self.room.limits.at_once:
            self._begin(self.waiting.popleft())
        if not events and (tool := self._short_of_spares()) is not None:
            self.idle[tool].append(self._new_worker(tool))
        return True

    def _patience(self) -> float:
        if self._short_of_spares():
            return 0.0
        deadlines = [running.deadline for running in self.running.values()]
        return max(0.0, min([IDLE_S, *(deadline - time.monotonic() for deadline in deadlines)]))

    def _short_of_spares(self) -> str | None:
        return next(
            (t for t, spare in self.idle.items() if len(spare) < self.room.limits.at_once), None
        )

    def _new_worker(self, tool: str) -> Worker:
        worker = start(tool, self.room, self.used, self.answer)
        self.selector.register(worker.socket, selectors.EVENT_READ, worker)
        return worker

    def _drop(self, worker: Worker) -> int:
        """Ends a worker for good; gives its exit status."""
        self.selector.unregister(worker.socket)
        if worker in self.idle.get(worker.tool, []):
            self.idle[worker.tool].remove(worker)
        status = end(worker)
        if worker.scratch is not None:
            shutil.rmtree(worker.scratch, ignore_errors=True)
        return status

    def _lose(self, worker: Worker) -> None:
        """An idle worker that says something has ended. A tool whose workers all do is refused."""
        status = self._drop(worker)
        self.stillborn[worker.tool] += 1
        if self.stillborn[worker.tool] >= MOST_STILLBORN:
            del self.idle[worker.tool]
            self.refused[worker.tool] = f"{worker.tool} cannot be shut in here ({_ending(status)})"

    def _read_link(self) -> bool:
        received = self.link.recv(65_536)
        self.inbox.add(received)
        while received and (message := self.inbox.take()):
            asked, _ = message
            self.waiting.append(Job(asked["id"], asked["tool"], asked["arguments"]))
        return bool(received)

    def _begin(self, job: Job) -> None:
        if job.tool not in self.idle:
            reason = self.refused.get(job.tool, f"{job.tool} is not among this run's tools")
            self._answer(job, 0.0, error=reason)
            return
        spare = self.idle[job.tool]
        worker = spare.pop() if spare else self._new_worker(job.tool)
        began = time.monotonic()
        running = Running(job, secrets.token_bytes(16), began, began + self.room.limits.seconds)
        self.running[worker] = running
        worker.calls += 1
        try:
            worker.socket.sendall(frames.pack(job.arguments, running.nonce))
        except OSError:
            self._finish(worker, error="the tool's process ended before the call")

    def _read_worker(self, worker: Worker) -> None:
        """Takes what a worker has sent: its answer, a part of it, or nothing any more."""
        try:
            received = worker.socket.recv(65_536)
            worker.inbox.add(received)
            message = worker.inbox.take()
        except (OSError, frames.BadFrame):
            self._finish(worker, error="the tool's process sent what is no answer")
            return
        if message is None:
            if not received:
                self._finish(worker)
            return
        answer, nonce = message
        if (
            nonce != self.running[worker].nonce
            or not worker.inbox.empty
            or not fits(answer, self.room.limits.output_chars)
        ):
            self._finish(worker, error="the tool's process sent what is no answer")
            return
        running = self.running.pop(worker)
        self.stillborn[worker.tool] = 0
        self._answer(running.job, time.monotonic() - running.began, **answer)
        if worker.calls < RUNNERS[worker.tool].calls:
            self.idle[worker.tool].append(worker)
        else:
            self._drop(worker)

    def _finish(self, worker: Worker, error: str | None = None) -> None:
        """Ends a call without an answer of its worker's, and the worker."""
        running = self.running.pop(worker)
        status = self._drop(worker)
        if error is None:
            error = f"the tool's process ended ({_ending(status)})"
        self._answer(running.job, time.monotonic() - running.began, error=error)

    def _answer(
        self,
        job: Job,
        seconds: float,
        value: Any = None,
        error: str | None = None,
        truncated: bool = False,
    ) -> None:
        answer = {"value": value, "error": error, "truncated": truncated}
        self.link.sendall(frames.pack({"id": job.number, "seconds": seconds, **answer}))


def fits(answer: Any, output_chars: int) -> bool:
    """Whether a worker's message has the shape and the size of an answer."""
    return (
        isinstance(answer, dict)
        and answer.keys() == {"value", "error", "truncated"}
        and isinstance(answer["error"], str | None)
        and len(answer["error"] or "") <= LONGEST_ERROR
        and isinstance(answer["truncated"], bool)
        and len(json.dumps(answer["value"], ensure_ascii=False)) <= output_chars
    )


def _ending(status: int) -> str:
    """An exit status in words."""
    if not os.WIFSIGNALED(status):
        return f"status {os.waitstatus_to_exitcode(status)}"
    signal = os.WTERMSIG(status)
    known = {
        9: "killed, as when its limit of CPU time is used up",
        11: "it crashed",
        31: "forbidden",
    }
    return known.get(signal, f"signal {signal}")
