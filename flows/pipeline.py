"""The Prefect flow: one task a node of DVC's graph, generated, not written by hand.

DVC decides whether a stage must run; Prefect decides when: order, parallel branches, retries, and
its UI. Prefect's own caching is off. What is not stale starts no process, and when nothing is
stale no Prefect either.

Without PREFECT_API_URL a server of our own runs for as long as the flow does and dies with it.
Prefect's ephemeral one starts 3 s sooner (benchmarks/overheads.py), but outlives a kill -9 and
goes on holding its database. With PREFECT_API_URL the runs go to that server.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.task_runners import ThreadPoolTaskRunner
from prefect.tasks import Task

from flows.plan import Node
from flows.stage_process import Outcome, StageFailed, StageRunner, StageStopped

SERVER_START_S = 120.0  # the first start creates its database


@dataclass(frozen=True)
class Work:
    """What the flow is about, and who is told."""

    nodes: list[Node]  # upstream before downstream
    runner: StageRunner
    parallel: int
    retries: int
    retry_after_s: int
    on_start: Callable[[Node], None]
    on_finish: Callable[[Outcome], None]
    on_failure: Callable[[Node, Exception], None]


def run_flow(work: Work, root: Path) -> list[Outcome]:
    """Run the nodes as a Prefect flow; gives their outcomes in order.

    Raises the first StageFailed; StageStopped when asked to stop.
    """
    with prefect_server(root):
        return _flow(work)(root.name)


def _flow(work: Work) -> Callable[[str], list[Outcome]]:
    """Generate the flow from the nodes and their edges."""
    slots = threading.Semaphore(work.parallel)

    @flow(
        name="nanofoundry",
        task_runner=ThreadPoolTaskRunner(max_workers=len(work.nodes) + 1),  # waiting holds a thread
        validate_parameters=False,
        persist_result=False,
    )
    def nanofoundry(project: str) -> list[Outcome]:
        """All chosen stages of the project, each behind those that it reads."""
        futures = {}
        with stop_on_signal(work.runner):  # here, because Prefect has put in its own by now
            for node in work.nodes:
                upstream = [futures[name] for name in node.upstream if name in futures]
                futures[node.name] = _task(node, work, slots).submit(upstream)
            results = [outcome_of(future) for future in futures.values()]
        raise_first_failure(results)
        return results

    return nanofoundry


def _task(node: Node, work: Work, slots: threading.Semaphore) -> Task:
    """The Prefect task of one node: run this one DVC stage in its own process group."""

    @task(
        name=node.name,
        cache_policy=NO_CACHE,
        persist_result=False,
        retries=work.retries,
        retry_delay_seconds=work.retry_after_s,
        retry_condition_fn=lambda _task, _run, state: may_pass(
            state.result(raise_on_failure=False)
        ),
    )
    def run_stage(upstream: list[Outcome]) -> Outcome:
        if not node.is_stale and all(outcome.state == "reused" for outcome in upstream):
            outcome = Outcome(node, "reused")
        else:
            with slots:
                work.on_start(node)
                try:
                    outcome = work.runner.run(node)
                except (StageFailed, StageStopped) as error:
                    work.on_failure(node, error)
                    raise
        work.on_finish(outcome)
        return outcome

    return run_stage


def outcome_of(future: PrefectFuture) -> object:
    """Wait for a task: its Outcome, its exception, or None for one whose upstream failed."""
    future.wait()
    state = future.state
    return state.result(raise_on_failure=False) if state.is_final() else None


def may_pass(error: object) -> bool:
    """Retry only what can pass by itself: memory that ran out, a network that went away."""
    return isinstance(error, StageFailed) and error.may_pass


def raise_first_failure(results: list[object]) -> None:
    """Raise the first failure that is a stage's own, else the first stop."""
    for kind in (StageFailed, StageStopped, Exception):
        for result in results:
            if isinstance(result, kind):
                raise result


@contextlib.contextmanager
def stop_on_signal(runner: StageRunner) -> Iterator[None]:
    """Turn SIGINT and SIGTERM into a stop with checkpoints; a second one is the default again.

    Outside the main thread (a Prefect worker's) signals are the worker's business.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _frame: object) -> None:
        signal.signal(number, before[number])
        runner.stop()

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def prefect_server(root: Path, schedules: bool = False) -> Iterator[None]:
    """Make sure that a Prefect server answers: the user's, or one of our own for this run.

    schedules: whether a server of our own also runs the services that start scheduled runs.
    """
    if os.environ.get("PREFECT_API_URL"):
        yield
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = root / "scratch" / "logs" / "prefect.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    services = "" if schedules else "--no-services"
    start = f"prefect server start {services} --host 127.0.0.1 --port".split()
    with log.open("ab") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.child", sys.executable, "-m", *start, str(port)],
            stdout=stream,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}/api"
    os.environ["PREFECT_API_URL"] = address  # for processes that are started from here
    try:
        _wait_for(process, port, log)
        with temporary_settings({PREFECT_API_URL: address}):  # Prefect read its own at its import
            yield
    finally:
        del os.environ["PREFECT_API_URL"]
        process.kill()  # it holds nothing that a flow run still needs
        process.wait()


def _wait_for(process: subprocess.Popen, port: int, log: Path) -> None:
    deadline = time.monotonic() + SERVER_START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/health", timeout=2):
                return
        except (URLError, OSError):
            time.sleep(0.1)
    raise RuntimeError(f"Prefect's server did not start; see {log}")
