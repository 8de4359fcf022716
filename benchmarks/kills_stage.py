"""kill -9 of one streamed stage at random moments, again and again: what does each kill cost?

    .venv/bin/python benchmarks/kills_stage.py [--stage extract] [--kills 30] [--set ...]

A clone runs what the stage needs and the stage itself, undisturbed, and its output is kept as the
measure. Then `python -m stages` is started alone, killed at a moment drawn uniformly from the
undisturbed length, and started again. Whenever it gets through, its output must be the measure's to
the bit; it is dropped, and goes on from nothing until all kills are spent.

A step is one shard (extract) or batch (profile) through one block. What a kill cost: the steps in
metrics.jsonl behind the checkpoint that the next start goes on from, and the seconds of work since
that checkpoint, or since work began again where that was later. `--every` is the wall time between
checkpoints; a stage makes them rarer where they would take more than 5 % of its time.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path
from statistics import median

from kills import PRESET, clone, run

from stages.checkpoint import newest_checkpoint, step_of

TEACHER = "smollm2-135m"
NEEDS = {"profile": ["prepare"], "extract": ["prepare", "profile"]}
STREAMED = ("profile.engine=streamed", "extract.engine=streamed")


@dataclass(frozen=True)
class Cost:
    """What one kill destroyed."""

    after_s: float  # from the start
    step: int  # the last one that was done
    checkpoint: int  # the step that the next start goes on from
    seconds: float  # of work

    @property
    def steps(self) -> int:
        """Steps to be done again."""
        return self.step - self.checkpoint


class Alone:
    """One stage in a clone, run without the flow."""

    def __init__(self, folder: Path, stage: str, every_s: float) -> None:
        self.folder = folder
        self.stage = stage
        self.every_s = every_s
        self.out = folder / "artifacts" / stage / TEACHER
        self.scratch = folder / "scratch" / f"{stage}@{TEACHER}"
        self.log, self.errors = folder / "stage.log", folder / "stage.err"

    def start(self) -> subprocess.Popen:
        """Start it in the background."""
        with self.log.open("w") as log, self.errors.open("w") as errors:
            return subprocess.Popen(
                [".venv/bin/python", "-m", "stages", self.stage, TEACHER],
                cwd=self.folder, stdout=log, stderr=errors,
                env={**os.environ, "NANOFOUNDRY_CHECKPOINT_EVERY_S": str(self.every_s)},
            )  # fmt: skip

    def check(self, code: int) -> None:
        """Leave, saying why, when it failed."""
        if code:
            raise SystemExit(f"the stage ended with {code}:\n{self.errors.read_text()[-2000:]}")

    def forget(self) -> None:
        """Drop its output and its unfinished work."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        shutil.rmtree(self.out, ignore_errors=True)

    def digests(self) -> dict[str, str]:
        """Checksums of all published files."""
        found = {}
        for path in sorted(path for path in self.out.rglob("*") if path.is_file()):
            with path.open("rb") as stream:
                found[str(path.relative_to(self.out))] = file_digest(stream, "sha256").hexdigest()
        return found

    def cost(self, after_s: float, killed_s: float) -> Cost:
        """What a kill at the wall time `killed_s` destroyed."""
        works = [path for path in self.scratch.glob("*") if path.is_dir()]
        if not works:
            return Cost(after_s, 0, 0, 0.0)
        checkpoint = newest_checkpoint(works[0] / "checkpoints" / "main")[0]
        kept = step_of(checkpoint) if checkpoint else 0
        times = {0: 0.0} | dict(self._steps(works[0] / "metrics.jsonl"))
        began_s = self.log.stat().st_mtime  # its last line is that of the engine, or "going on"
        if "streamed" not in self.log.read_text(encoding="utf-8"):  # it had not begun to work
            return Cost(after_s, kept, kept, 0.0)
        since_s = max(times.get(kept, 0.0), began_s)
        return Cost(after_s, max(times), kept, max(0.0, killed_s - since_s))

    def _steps(self, path: Path) -> list[tuple[int, float]]:
        """Steps and their wall times; a line that the kill tore is no step."""
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
        entries = [json.loads(line) for line in lines if line.endswith("}\n")]
        return [(entry["step"], entry["time_s"]) for entry in entries]


def main() -> None:
    """Run the experiment; print one line a kill and a summary."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", choices=NEEDS, default="extract")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--every", type=float, default=1.0, metavar="SECONDS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--set", dest="assignments", action="append", default=[], metavar="SECTION.KEY=VALUE",
        help="a parameter other than the tiny preset's; may be given several times",
    )  # fmt: skip
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        alone = Alone(clone(Path(folder) / "project"), options.stage, options.every)
        prepare(alone, options.assignments)
        length_s, wanted, total = undisturbed(alone)
        print(f"undisturbed: {length_s:.1f} s, {total} steps, {len(wanted)} files compared")
        costs, runs_through = [], 0
        while len(costs) < options.kills:
            cost = killed_once(alone, rng.uniform(0.0, length_s))
            if cost is None:
                assert alone.digests() == wanted, "the output differs from the undisturbed run's"
                runs_through += 1
                alone.forget()
                continue
            costs.append(cost)
            print(
                f"kill {len(costs):2} after {cost.after_s:5.1f} s: at step {cost.step:4}, goes on "
                f"from {cost.checkpoint:4}: {cost.steps:3} steps, {cost.seconds:4.1f} s of work",
                flush=True,
            )
        alone.check(alone.start().wait())
        assert alone.digests() == wanted, "the output differs from the undisturbed run's"
    print(f"got through {runs_through + 1} times, each identical in {len(wanted)} files")
    steps, seconds = [cost.steps for cost in costs], [cost.seconds for cost in costs]
    print(f"steps lost: median {median(steps)}, worst {max(steps)} of {total}")
    print(f"seconds of work lost: median {median(seconds):.1f}, worst {max(seconds):.1f}")


def prepare(alone: Alone, assignments: list[str]) -> None:
    """Run what the stage needs, with these parameters."""
    settings = [f"--set={text}" for text in (*STREAMED, *assignments)]
    run(alone.folder, ["--preset", PRESET, *settings, "--stage", NEEDS[alone.stage][0]])
    for stage in NEEDS[alone.stage][1:]:
        run(alone.folder, ["--stage", stage])


def undisturbed(alone: Alone) -> tuple[float, dict[str, str], int]:
    """Its length in seconds, the checksums of what it publishes, and how many steps it takes."""
    began = time.monotonic()
    alone.check(alone.start().wait())
    length_s = time.monotonic() - began
    (metrics,) = alone.scratch.glob("*/metrics.jsonl")
    total = json.loads(metrics.read_text(encoding="utf-8").splitlines()[-1])["total"]
    wanted = alone.digests()
    alone.forget()
    return length_s, wanted, total


def killed_once(alone: Alone, after_s: float) -> Cost | None:
    """Start it and kill it after some seconds; None when it got through before."""
    process = alone.start()
    try:
        alone.check(process.wait(timeout=after_s))
    except subprocess.TimeoutExpired:
        process.kill()
        killed_s = time.time()
        process.wait()
        return alone.cost(after_s, killed_s)
    return None


if __name__ == "__main__":
    main()
