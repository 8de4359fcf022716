"""Latency of warm tool calls, and a soak that looks for leaks.

    python -m benchmarks.tools                 1,000 calls of each tool, two at a time
    python -m benchmarks.tools --soak 60       calls for an hour (or --calls 20000), then the counts

Latency is what a caller waits: from `Tools.run` to its result, by two threads at once. CPU time is
that of this process and of every process below it, a call. On a machine that does other work CPU
time is the better figure.
"""

import argparse
import json
import statistics
import threading
import time
from collections.abc import Iterator

import psutil

from runtime.tools.calls import Call
from runtime.tools.dispatch import Tools

BARS_MS = {"calc": 5.0, "py": 25.0, "bash": 25.0}  # p95
CALLS, AT_ONCE, WARM = 1_000, 2, 20

PROGRAM = "total = 0\nfor n in range(100):\n    total += n * n\nprint(total)"


def calls_of(name: str) -> Iterator[Call]:
    """Calls such as a model makes, different ones in turn."""
    number = 0
    while True:
        number += 1
        a, b = number % 97 + 3, number % 89 + 2
        yield Call(
            *{
                "calc": (
                    ("calc", {"expression": f"{a}*{b}+{number}"}),
                    ("calc", {"expression": f"({a}.5-{b})*{a}/4"}),
                    ("calc", {"expression": f"{b}% of {a * 100}"}),
                    ("calc", {"expression": f"sqrt({a * a})+round({b}/7, 2)"}),
                ),
                "py": (
                    ("py", {"code": f"print({a} * {b})"}),
                    ("py", {"code": f"sum(n for n in range({a}))"}),
                    ("py", {"code": PROGRAM}),
                ),
                "bash": (
                    ("bash", {"command": f"seq {a} | wc -l"}),
                    ("bash", {"command": f"echo '{a}*{b}' | bc"}),
                    ("bash", {"command": f"printf '{a} {b}' | tr ' ' x"}),
                ),
            }[name][number % 3],
            "",
        )


def cpu_seconds() -> float:
    """CPU time so far of this process, the servers, and what they have waited for."""
    total = time.process_time()
    for server in servers():
        times = server.cpu_times()
        total += times.user + times.system + times.children_user + times.children_system
        for worker in server.children():
            spent = worker.cpu_times()
            total += spent.user + spent.system + spent.children_user + spent.children_system
    return total


def servers() -> list[psutil.Process]:
    """The processes that this one has started for the tools."""
    return psutil.Process().children()


def latency(tools: Tools, name: str, count: int, at_once: int) -> dict[str, float]:
    """Milliseconds a call, `at_once` callers at a time."""
    waited: list[float] = []
    source, lock = calls_of(name), threading.Lock()

    def ask(times: int) -> None:
        for _ in range(times):
            with lock:
                call = next(source)
            began = time.perf_counter()
            result = tools.run(call)
            waited.append(1_000 * (time.perf_counter() - began))
            if not result.ok:
                raise RuntimeError(f"{call}: {result.error}")

    tools.run_all([next(source) for _ in range(WARM)])
    spent = cpu_seconds()
    callers = [threading.Thread(target=ask, args=(count // at_once,)) for _ in range(at_once)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    if len(waited) != count // at_once * at_once:
        raise RuntimeError("a caller failed; see above")
    cuts = statistics.quantiles(waited, n=100)
    cpu = 1_000 * (cpu_seconds() - spent) / len(waited)
    return {"p50_ms": cuts[49], "p95_ms": cuts[94], "p99_ms": cuts[98], "cpu_ms": cpu}


def holdings() -> dict[str, int]:
    """What this process and the servers hold: resident MiB, open files, processes."""
    here = psutil.Process()
    below = here.children(recursive=True)
    return {
        "rss_mib_here": here.memory_info().rss >> 20,
        "rss_mib_servers": sum(server.memory_info().rss for server in servers()) >> 20,
        "files_here": here.num_fds(),
        "files_servers": sum(server.num_fds() for server in servers()),
        "processes": len(below),
    }


def soak(tools: Tools, minutes: float, count: int, share: float) -> None:
    """Calls of all tools, bad ones among them, with pauses so that a core is busy for `share`."""
    sources = [calls_of(name) for name in BARS_MS]
    for source in sources:
        tools.run_all([next(source) for _ in range(WARM)])
    time.sleep(2)
    before, began, done, failed = holdings(), time.monotonic(), 0, 0
    print(json.dumps({"before": before}), flush=True)
    while done < count and time.monotonic() - began < 60 * minutes:
        turn = time.monotonic()
        calls = [next(source) for source in sources for _ in range(4)]
        calls += [
            Call("py", {"code": "[0] * 10**9"}, ""),
            Call("calc", {"expression": "9^9^9"}, ""),
        ]
        if done % 2_800 == 0:
            calls += [Call("py", {"code": "while True: pass"}, "")]
        results = tools.run_all(calls)
        failed += sum(not result.ok for result in results[:12])
        done += len(calls)
        time.sleep((time.monotonic() - turn) * (1 / share - 1))
    time.sleep(2)
    minutes = (time.monotonic() - began) / 60
    print(json.dumps({"after": holdings(), "calls": done, "failed": failed}))
    print(f"{minutes:.1f} minutes")


def main() -> None:
    """Prints a table of latencies, or what a soak has counted."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--calls", type=int, default=CALLS, help="of each tool; of all in a soak")
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="look for leaks instead")
    parser.add_argument("--share", type=float, default=0.5, help="of a core, in a soak")
    parser.add_argument("--at-once", type=int, default=AT_ONCE, help="callers at a time")
    parser.add_argument("--tools", nargs="+", default=list(BARS_MS), choices=list(BARS_MS))
    chosen = parser.parse_args()
    with Tools(tuple(chosen.tools)) as tools:
        print(tools.level)
        if chosen.soak:
            soak(tools, chosen.soak, max(chosen.calls, 20_000), chosen.share)
            return
        for name in chosen.tools:
            found = latency(tools, name, chosen.calls, chosen.at_once)
            shown = "  ".join(f"{key} {value:7.2f}" for key, value in found.items())
            print(f"{name:5} {shown}   bar p95 {BARS_MS[name]:g} ms", flush=True)


if __name__ == "__main__":
    main()
