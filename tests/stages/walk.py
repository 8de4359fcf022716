"""The stages of the project in tests/stages/project.py, as text: walk, total, view, compare."""

from tests.tiny import REPOSITORY

DVC = """
stages:
  walk:
    cmd: python -m stages walk
    deps: [stages/walk]
    params: [walk]
    outs: [artifacts/walk]
    metrics: [{metrics/walk.json: {cache: false}}]
  total:
    cmd: python -m stages total
    deps: [artifacts/walk, stages/total]
    params: [total]
    outs: [artifacts/total]
    metrics: [{metrics/total.json: {cache: false}}]
  view:
    foreach: ${viewers}
    do:
      cmd: python -m stages view ${item}
      deps: [artifacts/walk, stages/view]
      params: [view, {viewers.yaml: ["${item}"]}]
      outs: ["artifacts/view/${item}"]
      metrics: [{"metrics/view/${item}.json": {cache: false}}]
  compare:
    cmd: python -m stages compare
    deps: [artifacts/view, stages/compare]
    outs: [artifacts/compare]
    metrics: [{metrics/compare.json: {cache: false}}]
"""

# The project's `stages` is the real one with two folders more.
PACKAGE = f"""
__path__.append({str(REPOSITORY / "stages")!r})
"""

WALK = '''
"""A seeded random walk, checkpointed after each step; $TROUBLE says what happens, and when."""

import builtins
import errno
import os
import signal
import time
from dataclasses import dataclass

import numpy as np

import stages.contract
from stages.contract import Stage
from stages.params import require_at_least

stages.contract.CHECKPOINT_EVERY_S = float(os.environ.get("CHECKPOINT_EVERY_S", "0"))


@dataclass(frozen=True)
class Params:
    steps: int
    size: int
    seed: int
    pace_s: float

    def __post_init__(self):
        require_at_least(1, steps=self.steps, size=self.size)


class Walk:
    def __init__(self, size):
        self.step, self.position = 0, np.zeros(size)

    def save(self, folder):
        np.save(folder / "position.npy", self.position)
        (folder / "step.txt").write_text(str(self.step))

    def load(self, folder):
        self.position = np.load(folder / "position.npy")
        self.step = int((folder / "step.txt").read_text())


def run(params, job):
    walk = job.resume(Walk(params.size))
    for step in range(walk.step + 1, params.steps + 1):
        walk.position += np.random.default_rng([params.seed, step]).normal(size=params.size)
        walk.step = step
        time.sleep(params.pace_s)
        trouble(f"in step {step}")
        job.step_done(walk, step, params.steps, distance=float(np.abs(walk.position).mean()))
        trouble(f"after step {step}")
    np.save(job.output / "walk.npy", walk.position)
    (job.output / "more").mkdir(exist_ok=True)
    (job.output / "more" / "steps.txt").write_text(str(walk.step))
    trouble("at the end")
    return {"distance": float(np.abs(walk.position).mean()), "steps": walk.step}


def trouble(now):
    what, _, when = os.environ.get("TROUBLE", "").partition(" ")
    if when != now:
        return
    if what == "ENOSPC":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "walk.npy")
    if what == "wait":
        time.sleep(60)
    elif what.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[what])
    else:
        raise getattr(builtins, what)("as was asked")


STAGE = Stage("walk", Params, run)
'''

TOTAL = '''
"""The sum of a walk."""

from dataclasses import dataclass

import numpy as np

from stages.contract import Stage


@dataclass(frozen=True)
class Params:
    opens: str


def run(params, job):
    total = float(np.load(job.input(params.opens) / "walk.npy").sum())
    (job.output / "total.txt").write_text(repr(total))
    return {"total": total}


STAGE = Stage("total", Params, run)
'''

VIEW = '''
"""A walk as one viewer sees it."""

from dataclasses import dataclass

from stages.contract import Stage


@dataclass(frozen=True)
class Params:
    colour: str


def run(params, job):
    (job.output / "view.txt").write_text(job.item)
    return {"views": 1}


STAGE = Stage("view", Params, run)
'''

PARAMS = {
    "viewers": ["ada", "ben"],
    "walk": {"steps": 8, "size": 5, "seed": 0, "pace_s": 0.0},
    "total": {"opens": "walk"},
    "view": {"colour": "red"},
}
