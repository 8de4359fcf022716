"""The stage contract: what a stage is, and what the Job that it is handed promises.

A stage is a frozen dataclass of parameters and one function `run(params, job) -> metrics`. It
knows nothing of DVC, Prefect or MLflow.

    scratch/NODE/lock                       held while the stage runs
    scratch/NODE/FINGERPRINT/output/        what the stage has made so far
    scratch/NODE/FINGERPRINT/checkpoints/   how to go on after an interruption
    scratch/NODE/FINGERPRINT/metrics.jsonl  the curve, a line a step
    scratch/NODE/FINGERPRINT/result.json    written last: output is complete
    artifacts/NODE                          the published output

DVC deletes a stage's outs before it runs, so nothing that must survive a crash lives in artifacts/.

A stage whose parameters have a field `processes` may run in several (stages/launch.py). Each has a
Job; that of the first writes all of this, those of the others nothing.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from stages.checkpoint import Resumable, newest_checkpoint, save_checkpoint, step_of
from stages.declaration import Declaration
from stages.digests import MANIFEST, fingerprint, write_manifest
from stages.process import Stopped, StopRequest
from stages.progress import Progress
from stages.ranks import ALONE, Ranks

Metrics = dict[str, float]
State = TypeVar("State", bound=Resumable)

# Wall time between checkpoints, what a kill -9 can cost; the flow sets it from params.yaml.
CHECKPOINT_EVERY_S = float(os.environ.get("NANOFOUNDRY_CHECKPOINT_EVERY_S", "30"))
CHECKPOINT_SHARE = 0.05  # of a stage's time at most: large states are written less often
KEEP_FINGERPRINTS = 3  # unfinished work of other parameters that is kept


@dataclass(frozen=True)
class Stage:
    """A stage: its name (one name everywhere), its parameters and its function.

    check_among: refuses, with a ValueError, parameters that other stages' contradict; it gets those
    of all stages by name, before anything runs.
    """

    name: str
    params: type
    run: Callable[[Any, "Job"], Metrics]
    check_among: Callable[[Mapping[str, Any]], None] | None = None


class Job:
    """One execution of one stage: where it reads, where it writes, how it goes on and stops."""

    def __init__(
        self, root: Path, declaration: Declaration, stop: StopRequest, ranks: Ranks = ALONE
    ) -> None:
        self.root = root
        self.ranks = ranks
        self.declaration = declaration
        self.node = declaration.node
        self.item = declaration.item
        for stage, path in declaration.inputs.items():
            if not any((root / path).rglob(MANIFEST)):
                raise FileNotFoundError(
                    f"stage '{self.node}' needs {path}, which is not there; "
                    f"run that stage first: ./run_pipeline.sh --stage {stage}"
                )
        self.fingerprint = fingerprint(root, declaration)
        self.folder = root / "scratch" / self.node / self.fingerprint[:16]
        if self.leads:
            self._begin()
        self._stop = stop
        self._last_checkpoint = time.monotonic()
        self._checkpoint_took_s = 0.0
        self._shown: list[str] = []
        self._measured: Metrics = {}

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes; always so when it is alone."""
        return self.ranks.leads

    @property
    def output(self) -> Path:
        """Where the stage's files go; raises RuntimeError in a process that must not write."""
        if not self.leads:
            raise RuntimeError(
                f"process {self.ranks.index} of {self.ranks.count} of '{self.node}' wanted to "
                "write output, which the first one alone does; ask job.leads before"
            )
        return self.folder / "output"

    @property
    def is_stopping(self) -> bool:
        """Whether the stage was asked to stop, for one that waits instead of taking steps."""
        return self._stop.requested

    def input(self, stage: str) -> Path:
        """The folder of a finished stage; raises ValueError for one not declared in dvc.yaml."""
        inputs = self.declaration.inputs
        if stage not in inputs:
            declared = ", ".join(inputs) or "no input"
            raise ValueError(
                f"stage '{self.node}' opened '{stage}', but its entry in dvc.yaml declares "
                f"{declared}; add artifacts/{stage} to its deps"
            )
        return self.root / inputs[stage]

    def inputs(self, stage: str) -> dict[str, Path]:
        """The folders of a stage that ran once a teacher, by the teacher's name."""
        folder = self.input(stage)
        return {path.parent.name: path.parent for path in sorted(folder.glob(f"*/{MANIFEST}"))}

    def resume(self, fresh: State, phase: str = "main") -> State:
        """Give `fresh`, brought to the last intact checkpoint of this phase if there is one.

        Only checkpoints of the same fingerprint (parameters, inputs, code, libraries) count.
        """
        self._last_checkpoint = time.monotonic()
        checkpoint, problems = self.ranks.of_lead(newest_checkpoint(self._checkpoints(phase)))
        for problem in problems:
            self.say(f"damaged checkpoint: {problem}")
        step = step_of(checkpoint) if checkpoint else 0
        if self.leads:
            self.progress.cut_back(phase, step)
        if checkpoint:
            fresh.load(checkpoint)
            self.say(f"going on from step {step} of {phase}")
        return fresh

    def step_done(
        self, state: Resumable, step: int, total: int, phase: str = "main", **metrics: float
    ) -> None:
        """Record a step; write a checkpoint when one is due; after SIGTERM checkpoint and stop.

        Raises Stopped when asked to stop, in all processes when one of them is asked. The last step
        of a phase is always checkpointed, so that a later phase never repeats an earlier one.
        """
        if self.leads:
            self.progress.add(phase, step, total, metrics)
        stops = self.ranks.any(self._stop.requested)
        began = time.monotonic()
        wait_s = CHECKPOINT_EVERY_S and max(
            CHECKPOINT_EVERY_S, self._checkpoint_took_s / CHECKPOINT_SHARE
        )
        is_due = began - self._last_checkpoint >= wait_s or step == total or stops
        if self.leads and is_due:
            save_checkpoint(state, self._checkpoints(phase), step)
            self._last_checkpoint = time.monotonic()
            self._checkpoint_took_s = self._last_checkpoint - began
        if stops:
            raise Stopped(f"stopped at step {step} of {total}; run it again to go on from there")

    def note(self, phase: str, step: int, total: int, **metrics: float) -> None:
        """Record a step that is cheap enough to be done again after an interruption."""
        if self.leads:
            self.progress.cut_back(phase, step - 1)
            self.progress.add(phase, step, total, metrics)

    def show(self, name: str) -> None:
        """Name a picture or report in `output` that reviewers should see in MLflow."""
        self._shown.append(name)

    def measured(self, **values: float) -> None:
        """Report numbers that differ from run to run (seconds, bytes); kept apart from metrics."""
        self._measured.update(values)

    def say(self, text: str) -> None:
        """Print one line to the stage's log; in the first process only."""
        if self.leads:
            sys.stdout.write(f"{self.node}: {text}\n")
            sys.stdout.flush()

    def is_complete(self) -> bool:
        """Whether this work is done and only its publication was interrupted."""
        return (self.folder / "result.json").is_file()

    def complete(self, metrics: Metrics, usage: Metrics) -> None:
        """Write the manifest and, last of all, the result."""
        write_manifest(self.output)
        result = {"metrics": metrics, "measured": {**usage, **self._measured}, "shown": self._shown}
        write_json(self.folder / "result.json", result)

    def publish(self) -> None:
        """Put output and metrics in their places: hard links, then one rename. All or nothing.

        Links, not a move: DVC deletes outs at its next start, and a kill between here and DVC's
        own record must not cost the work.
        """
        target = self.root / self.declaration.out
        staging = self.folder / "publishing"
        shutil.rmtree(staging, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(self.output, staging, copy_function=os.link)
        shutil.rmtree(target, ignore_errors=True)
        staging.rename(target)
        result = json.loads((self.folder / "result.json").read_text(encoding="utf-8"))
        write_json(self.root / self.declaration.metrics, result["metrics"])

    def _begin(self) -> None:
        """Make the folders, and clear away what a kill has left in them."""
        self.output.mkdir(parents=True, exist_ok=True)
        for torn in self.output.rglob(".tmp*"):  # safetensors' own, of a write that was killed
            torn.unlink()
        self.folder.touch()
        self._forget_older_work()
        self.progress = Progress(self.folder / "metrics.jsonl", self.node)

    def _checkpoints(self, phase: str) -> Path:
        return self.folder / "checkpoints" / phase

    def _forget_older_work(self) -> None:
        others = [path for path in self.folder.parent.iterdir() if path.is_dir()]
        others.sort(key=lambda path: path.stat().st_mtime)
        for old in others[:-KEEP_FINGERPRINTS]:
            shutil.rmtree(old)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file by way of `.part` and a rename, so that nobody reads half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    part.replace(path)
