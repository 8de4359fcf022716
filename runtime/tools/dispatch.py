"""Runs tool calls: the one door to the tools for training, benchmarks and the agent.

    with Tools(log=Path("calls.jsonl")) as tools:
        print(tools.level)
        tools.run(find_call('<<calc>>{"expression": "12*34"}')).value    # 408

The fork server starts in the background when the context is entered (it imports sympy for a second
or two); the first call waits for it. Calls may come from several threads. A server that dies is
started again, and calls that it had are tried once more. Given the same calls the values are the
same, except where a call comes close to the deadline.
"""

import dataclasses
import itertools
import json
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from runtime.tools.calls import SCHEMAS, BadCall, Call, ToolResult, check_arguments
from runtime.tools.connection import Connection, ServerDied
from runtime.tools.sandbox import LAYERS, Limits, Protection

__all__ = ["Limits", "ToolResult", "Tools"]


class Tools:
    """The tools of one run: `with Tools() as tools: tools.run(call)`.

    names: which of calc, py and bash. limits: of each call. log: a file to which a line of JSON is
    added for every call: time, tool, arguments, value, error, seconds. unsafe: let py and bash run
    where the sandbox lacks what they need. layers: those of the sandbox that are tried (all, except
    in tests). server: the module that is run as the server (tests have a hostile one).
    """

    def __init__(
        self,
        names: Sequence[str] = ("calc", "py", "bash"),
        limits: Limits | None = None,
        log: Path | None = None,
        unsafe: bool = False,
        layers: Sequence[str] = LAYERS,
        server: str = "runtime.tools",
    ):
        for name in names:
            if name not in SCHEMAS:
                raise ValueError(f"no tool {name!r}; there are {', '.join(SCHEMAS)}")
        self.limits = limits or Limits()
        self._settings = {
            "names": list(names),
            "limits": dataclasses.asdict(self.limits),
            "layers": list(layers),
            "unsafe": unsafe,
        }
        self._server = server
        self._log_path = log
        self._log: TextIO | None = None
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._numbers = itertools.count()

    def __enter__(self) -> Self:
        if self._log_path is not None:
            self._log_path.parent.mkdir(parents=True, exist_ok=True)
            self._log = self._log_path.open("a", encoding="utf-8")
        self._connection = Connection(self._server, self._settings)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._connection is not None:
            self._connection.close()
        if self._log is not None:
            self._log.close()
        self._connection = self._log = None

    @property
    def protection(self) -> Protection:
        """The layers of the sandbox that hold here. Waits for the server."""
        ready = self._connected().ready()
        return Protection(tuple(ready["layers"]), ready["abi"])

    @property
    def refused(self) -> dict[str, str]:
        """The tools that do not run here, and why."""
        return dict(self._connected().ready()["refused"])

    @property
    def level(self) -> str:
        """What protects, what is missing and what is refused, in words for people and MLflow."""
        refused = f"; refused: {', '.join(self.refused)}" if self.refused else ""
        unsafe = "; UNSAFE: runs all the same" if self._settings["unsafe"] else ""
        return self.protection.words + refused + unsafe

    def run(self, call: Call | BadCall) -> ToolResult:
        """Runs one call. What goes wrong is in the result; nothing is raised for it."""
        return self.run_all([call])[0]

    def run_all(self, calls: Iterable[Call | BadCall]) -> list[ToolResult]:
        """Runs calls, `limits.at_once` at a time, and gives their results in order."""
        calls = list(calls)
        connection = self._connected()
        asked = [self._ask(connection, call) for call in calls]
        results = []
        for call, given in zip(calls, asked, strict=True):
            result = self._await(connection, call, given)
            self._note(call, result)
            results.append(result)
        return results

    def _ask(self, connection: Connection, call: Call | BadCall) -> "Future[ToolResult]":
        """Sends a call, unless it is clear already what comes of it."""
        wrong = call.error if isinstance(call, BadCall) else check_arguments(*_parts(call))
        if wrong:
            done: Future[ToolResult] = Future()
            done.set_result(ToolResult(False, None, wrong, 0.0))
            return done
        return connection.ask({"id": next(self._numbers), "tool": call.name}, call.arguments)

    def _await(
        self, connection: Connection, call: Call | BadCall, given: "Future[ToolResult]"
    ) -> ToolResult:
        """The result of a call; one that a dying server has lost is tried once more."""
        try:
            return connection.result(given, self.limits.seconds)
        except ServerDied:
            again = self._restarted(connection)
        try:
            return again.result(self._ask(again, call), self.limits.seconds)
        except ServerDied as death:
            return ToolResult(False, None, f"the tool server ended: {death}", 0.0)

    def _connected(self) -> Connection:
        if self._connection is None:
            raise RuntimeError("use the tools inside `with Tools() as tools:`")
        if self._connection.dead:
            return self._restarted(self._connection)
        return self._connection

    def _restarted(self, dead: Connection) -> Connection:
        """A connection to a new server; whoever comes first starts it."""
        with self._lock:
            if self._connection is dead:
                dead.close()
                self._connection = Connection(self._server, self._settings)
            if self._connection is None:
                raise RuntimeError("the tools were closed while a call ran")
            return self._connection

    def _note(self, call: Call | BadCall, result: ToolResult) -> None:
        if self._log is None:
            return
        line: dict[str, Any] = {"time": round(time.time(), 3)}
        if isinstance(call, Call):
            line |= {"tool": call.name, "arguments": call.arguments}
        else:
            line |= {"tool": None, "text": call.text}
        line |= dataclasses.asdict(result)
        with self._lock:
            self._log.write(json.dumps(line, ensure_ascii=False) + "\n")
            self._log.flush()


def _parts(call: Call) -> tuple[str, dict[str, Any]]:
    return call.name, call.arguments
