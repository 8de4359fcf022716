"""Runs tool calls: the one door to the tools for training, benchmarks and the agent.

    with Tools(log=Path("calls.jsonl")) as tools:
        print(tools.level)
        tools.run(find_call('<<calc>>{"expression": "12*34"}')).value    # 408

The fork servers start in the background when the context is entered (that of calc imports sympy for
a second or two); the first call waits for its own. Calls may come from several threads. A server
that dies is started again, and calls that it had are tried once more. Given the same calls the
values are the same, except where a call comes close to the deadline.
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

# Which tools share a fork server: forking costs by what is loaded, and only calc needs sympy.
SERVERS = (("calc",), ("py", "bash"))
Asked = tuple[Connection, Future[ToolResult]]


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
        self.names = tuple(names)
        self.limits = limits or Limits()
        self._settings = {
            "limits": dataclasses.asdict(self.limits),
            "layers": list(layers),
            "unsafe": unsafe,
        }
        self._server = server
        self._log_path = log
        self._log: TextIO | None = None
        self._lock = threading.Lock()
        self._connections: dict[str, Connection] = {}  # tool -> its server
        self._numbers = itertools.count()

    def __enter__(self) -> Self:
        if self._log_path is not None:
            self._log_path.parent.mkdir(parents=True, exist_ok=True)
            self._log = self._log_path.open("a", encoding="utf-8", errors="backslashreplace")
        for group in SERVERS:
            self._start(group)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for connection in set(self._connections.values()):
            connection.close()
        if self._log is not None:
            self._log.close()
        self._connections, self._log = {}, None

    @property
    def protection(self) -> Protection:
        """The layers of the sandbox that hold here. Waits for the server."""
        found = [one.ready() for one in set(map(self._connected, self.names))]
        layers = tuple(x for x in LAYERS if all(x in ready["layers"] for ready in found))
        return Protection(layers, min(ready["abi"] for ready in found))

    @property
    def refused(self) -> dict[str, str]:
        """The tools that do not run here, and why."""
        each = (self._connected(name).ready()["refused"] for name in self.names)
        return {name: why for refused in each for name, why in refused.items()}

    @property
    def level(self) -> str:
        """What protects, what is missing and what is refused, in words for people and MLflow."""
        refused = f"; refused: {', '.join(self.refused)}" if self.refused else ""
        unsafe = "; UNSAFE: runs all the same" if self._settings["unsafe"] else ""
        return self.protection.words + refused + unsafe

    def run(self, call: Call | BadCall) -> ToolResult:
        """Runs one call. What goes wrong in it is in the result.

        Raises CannotStart when the server does not come up.
        """
        return self.run_all([call])[0]

    def run_all(self, calls: Iterable[Call | BadCall]) -> list[ToolResult]:
        """Runs calls, `limits.at_once` at a time, and gives their results in order."""
        calls = list(calls)
        asked = [self._ask(call) for call in calls]
        results = []
        for call, given in zip(calls, asked, strict=True):
            result = self._await(call, given)
            self._note(call, result)
            results.append(result)
        return results

    def _ask(self, call: Call | BadCall) -> "Asked | ToolResult":
        """Sends a call, unless it is clear already what comes of it."""
        if isinstance(call, BadCall):
            return ToolResult(False, None, call.error, 0.0)
        if call.name not in self.names:
            wrong = f"there is no tool {call.name!r} here; there are {', '.join(self.names)}"
            return ToolResult(False, None, wrong, 0.0)
        wrong = check_arguments(call.name, call.arguments)
        if wrong:
            return ToolResult(False, None, wrong, 0.0)
        connection = self._connected(call.name)
        return connection, connection.ask(next(self._numbers), call.name, call.arguments)

    def _await(self, call: Call | BadCall, asked: "Asked | ToolResult") -> ToolResult:
        """The result of a call; one that a dying server has lost is tried once more."""
        for last in (False, True):
            if isinstance(asked, ToolResult):
                return asked
            connection, given = asked
            try:
                return connection.result(given, self.limits.seconds)
            except ServerDied as death:
                lost = ToolResult(False, None, f"the tool server ended: {death}", 0.0)
                asked = lost if last else self._ask(call)
        return lost

    def _start(self, group: Sequence[str]) -> None:
        names = [name for name in group if name in self.names]
        if names:
            connection = Connection(self._server, self._settings | {"names": names})
            self._connections |= dict.fromkeys(names, connection)

    def _connected(self, name: str) -> Connection:
        """The server of a tool; whoever first finds it dead starts another."""
        with self._lock:
            if name not in self._connections:
                raise RuntimeError("use the tools inside `with Tools() as tools:`")
            if self._connections[name].dead:
                self._connections[name].close()
                self._start(next(group for group in SERVERS if name in group))
            return self._connections[name]

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
