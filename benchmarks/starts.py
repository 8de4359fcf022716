"""Fifty starts at once: exactly one runs, the others leave and name it. Then the holder is killed.

.venv/bin/python benchmarks/starts.py [--starts 50]
"""

import argparse
import os
import re
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from kills import clone, kill_tree, processes_in


def main() -> None:
    """Run the experiment and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--starts", type=int, default=50)
    count = parser.parse_args().starts
    with tempfile.TemporaryDirectory(prefix="starts-") as folder:
        project = clone(Path(folder) / "project")
        began = time.monotonic()
        processes = [start(project) for _ in range(count)]
        losers = []
        while len(losers) < count - 1:
            losers = [process for process in processes if process.poll() is not None]
            time.sleep(0.05)
        seconds = time.monotonic() - began
        (holder,) = (process for process in processes if process.poll() is None)
        told = [process.stderr.read() for process in losers]
        codes = {process.returncode for process in losers}
        named = sum(f"pid {holder.pid} " in text for text in told)
        print(f"{count} starts: 1 runs, {len(losers)} left with {codes} within {seconds:.1f} s")
        print(f"of those, {named} named the holder, e.g.: {told[0].strip().splitlines()[-1]}")
        kill_tree(holder)
        print(f"holder killed with -9; processes left: {len(processes_in(project))}")
        following = start(project)
        began = time.monotonic()
        line = ""
        while not re.search("prepare|killed", line):
            line = following.stdout.readline()
        print(f"the next start goes on after {time.monotonic() - began:.1f} s: {line.strip()}")
        os.kill(following.pid, signal.SIGTERM)
        following.wait()
        print(f"and stops on SIGTERM with exit code {following.returncode}")


def start(project: Path) -> subprocess.Popen:
    """Start a run with its output kept."""
    return subprocess.Popen(
        ["./run_pipeline.sh", "--preset", "tiny"], cwd=project, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


if __name__ == "__main__":
    main()
