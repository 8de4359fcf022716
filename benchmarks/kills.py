"""kill -9 of the whole process tree at random moments, again and again: is anything lost?

    .venv/bin/python benchmarks/kills.py [--kills 20] [--seed 0] [--set extract.engine=streamed ...]

Few moments of a whole pipeline are of one stage: benchmarks/kills_stage.py kills one alone.

Two clones run the tiny preset: one undisturbed, the other killed at random moments and started
again. Whenever the second gets through, its student and metrics must equal the first's to the bit;
then it is reset and goes on until all kills are spent. After each kill: no process of the clone is
left, and the next start gets the lock. At the end: MLflow has no run that is still RUNNING, and
the last parent's nested runs hold every step once.
"""

import argparse
import json
import random
import subprocess
import tempfile
import time
from hashlib import file_digest
from pathlib import Path

import psutil

PROJECT = Path(__file__).resolve().parent.parent
PRESET = "tiny"


def main() -> None:
    """Run the experiment and print one line a kill and a summary."""
    options = parse()
    arguments = ["--preset", PRESET, *(f"--set={text}" for text in options.assignments)]
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        calm, stormy = clone(Path(folder) / "calm"), clone(Path(folder) / "stormy")
        began = time.monotonic()
        run(calm, arguments)
        length_s = time.monotonic() - began
        wanted = digests(calm)
        print(f"undisturbed: {length_s:.0f} s, {len(wanted)} files compared")
        kills, runs_through, orphans = 0, 0, 0
        where: dict[str, int] = {}
        while kills < options.kills:
            process = start(stormy, arguments)
            try:
                process.wait(timeout=rng.uniform(2.0, length_s))
            except subprocess.TimeoutExpired:
                stage = running_stage(stormy)
                kill_tree(process)
                kills += 1
                where[stage] = where.get(stage, 0) + 1
                left = processes_in(stormy)
                orphans += len(left)
                print(f"kill {kills:2}: during {stage}; processes left: {len(left)}", flush=True)
                continue
            if process.returncode:
                raise SystemExit(f"a run ended with {process.returncode}:\n{said(stormy)}")
            assert digests(stormy) == wanted, "the result differs from the undisturbed run's"
            runs_through += 1
            command = ["./run_pipeline.sh", "--reset", "--yes"]
            subprocess.run(command, cwd=stormy, check=True, capture_output=True)
        run(stormy, arguments)
        assert digests(stormy) == wanted, "the result differs from the undisturbed run's"
        print(f"runs that got through in between, identical: {runs_through}; kills in: {where}")
        print(f"final student, metrics: identical bits in {len(wanted)} files; orphans: {orphans}")
        print(f"MLflow: {mlflow_summary(stormy)}")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--set", dest="assignments", action="append", default=[], metavar="SECTION.KEY=VALUE",
        help="a parameter that both clones run with; may be given several times",
    )  # fmt: skip
    return parser.parse_args()


def clone(folder: Path) -> Path:
    """A working copy of the project as it is, with the same .venv."""
    subprocess.run(["git", "clone", "--quiet", str(PROJECT), str(folder)], check=True)
    (folder / ".venv").symlink_to(PROJECT / ".venv")
    return folder


def start(folder: Path, arguments: list[str]) -> subprocess.Popen:
    """Start run_pipeline.sh in the background; what it prints goes to a file beside the folder."""
    with folder.with_suffix(".log").open("w") as log:
        return subprocess.Popen(
            ["./run_pipeline.sh", *arguments],
            cwd=folder,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def run(folder: Path, arguments: list[str]) -> None:
    """Run to the end."""
    if start(folder, arguments).wait():
        raise SystemExit(f"a run failed:\n{said(folder)}")


def said(folder: Path) -> str:
    """The end of what the last run printed."""
    return "\n".join(folder.with_suffix(".log").read_text().splitlines()[-15:])


def kill_tree(process: subprocess.Popen) -> None:
    """kill -9 a process and all that descend from it."""
    tree = [psutil.Process(process.pid)]
    tree += tree[0].children(recursive=True)
    for victim in tree:
        try:
            victim.kill()
        except psutil.NoSuchProcess:
            pass
    process.wait()


def processes_in(folder: Path, patience_s: float = 5.0) -> list[int]:
    """Processes that still work in a folder, after they had some seconds to be gone."""
    deadline = time.monotonic() + patience_s
    while True:
        left = []
        for process in psutil.process_iter(["pid", "cwd", "status"]):
            inside = (process.info["cwd"] or "").startswith(str(folder))
            if inside and process.info["status"] != psutil.STATUS_ZOMBIE:
                left.append(process.info["pid"])
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.1)


def running_stage(folder: Path) -> str:
    """The stage at work, by the outcome files."""
    for path in sorted((folder / "scratch").glob("*/outcome.json")):
        try:
            if json.loads(path.read_text())["state"] == "running":
                return path.parent.name
        except json.JSONDecodeError:
            continue
    return "between stages"


def digests(folder: Path) -> dict[str, str]:
    """Checksums of what must not depend on interruptions: all weights and targets, all metrics."""
    files = [*folder.glob("artifacts/**/*.safetensors"), *folder.glob("metrics/**/*.json")]
    files += [*folder.glob("artifacts/prepare/**/*.npy"), *folder.glob("artifacts/distill/*.json")]
    found = {}
    for path in sorted(files):
        with path.open("rb") as stream:
            found[str(path.relative_to(folder))] = file_digest(stream, "sha256").hexdigest()
    return found


def mlflow_summary(folder: Path) -> str:
    """Check the store: nothing RUNNING, the last parent whole, each step once."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlruns/mlflow.db")
    experiment = client.get_experiment_by_name("nanofoundry").experiment_id
    runs = client.search_runs([experiment], max_results=5000)
    running = [run for run in runs if run.info.status == "RUNNING"]
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    last = max(parents, key=lambda run: run.info.start_time)
    nested = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == last.info.run_id]
    assert not running, f"{len(running)} runs are still RUNNING"
    assert {run.info.status for run in nested} == {"FINISHED"}
    for run in nested:
        for key in run.data.metrics:
            steps = [metric.step for metric in client.get_metric_history(run.info.run_id, key)]
            assert len(steps) == len(set(steps)), f"{run.info.run_name}: {key} has a step twice"
    killed = sum(run.info.status == "KILLED" for run in parents)
    return f"{len(parents)} runs ({killed} KILLED, 0 RUNNING), the last of {len(nested)} stages"


if __name__ == "__main__":
    main()
