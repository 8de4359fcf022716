"""A small project to run flows on: the real packages, and toy stages in the shape of a diamond.

    seed -> leaf@smollm2-135m, leaf@mamba-130m -> join

A stage counts to `steps`, a line in metrics.jsonl a step, and multiplies. Files that are no inputs
say how it behaves, so that behaviour changes no fingerprint:

    marks           "start seed", "end seed", ... in the order in which it happened
    hold            while it is there, steps take their time
    odd             while it is there, there is a metric pass@1 too
    trouble/NODE    a line a start, the first start takes the first: ValueError, SIGKILL, meet, fine
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
DEADLINE_S = 60.0  # only a test that fails waits so long
TEACHERS = ("smollm2-135m", "mamba-130m")
NODES = ("seed", "leaf@mamba-130m", "leaf@smollm2-135m", "join")

DVC = """
stages:
  seed:
    desc: where it begins
    meta: {headline: value}
    cmd: python -m stages seed
    deps: [stages/seed, stages/toy.py]
    params: [seed]
    outs: [artifacts/seed]
    metrics: [{metrics/seed.json: {cache: false}}]
  leaf:
    foreach: ${teachers}
    do:
      desc: one branch a teacher
      meta: {headline: value}
      cmd: python -m stages leaf ${item}
      deps: [artifacts/seed, stages/leaf, stages/toy.py]
      params: [leaf, {registry/teachers.yaml: ["${item}"]}]
      outs: ["artifacts/leaf/${item}"]
      metrics: [{"metrics/leaf/${item}.json": {cache: false}}]
  join:
    desc: the branches together
    meta: {headline: value}
    cmd: python -m stages join
    deps: [artifacts/leaf, stages/join, stages/toy.py]
    params: [join]
    outs: [artifacts/join]
    metrics: [{metrics/join.json: {cache: false}}]
"""

PARAMS = """\
# Every knob of the toys.
preset: small                 # where this file came from
teachers: [smollm2-135m, mamba-130m]  # a leaf each

pipeline:                     # how runs are carried out
  parallel_stages: 2
  retries: 2
  retry_after_s: 0
  checkpoint_every_s: 30
  champion_metric: value
  expected:
    seed: {seconds: 10, gib: 0.5}
    join: {seconds: 20, gib: 0.5}

seed:
  value: 1                    # what all others multiply
  steps: 5

leaf:
  value: 2
  steps: 5

join:
  value: 3
  steps: 5
"""

TOY = '''
"""Counts and multiplies; see tests/flows/project.py."""

import builtins
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from stages.contract import Stage
from stages.params import require_at_least


@dataclass(frozen=True)
class Params:
    value: int
    steps: int

    def __post_init__(self):
        require_at_least(1, steps=self.steps)


class Count:
    step = 0

    def save(self, folder):
        (folder / "step.txt").write_text(str(self.step))

    def load(self, folder):
        self.step = int((folder / "step.txt").read_text())


def mark(what, node):
    with open("marks", "a") as marks:
        marks.write(f"{what} {node}\\n")


def trouble(job):
    path = Path("trouble", job.node)
    lines = path.read_text().splitlines() if path.is_file() else []
    path.write_text("\\n".join(lines[1:])) if lines else None
    what = lines[0] if lines else "fine"
    if what == "meet":  # a sibling, which must have been started while this one runs
        deadline = time.monotonic() + 60
        while sum(line.startswith("start leaf") for line in open("marks")) < 2:
            assert time.monotonic() < deadline, "nobody came"
            time.sleep(0.05)
    elif what.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[what])
    elif what != "fine":
        raise getattr(builtins, what)("as was asked")


def run(params, job):
    mark("start", job.node)
    trouble(job)
    count = job.resume(Count())
    for step in range(count.step + 1, params.steps + 1):
        time.sleep(0.1 if Path("hold").exists() else 0)
        count.step = step
        job.step_done(count, step, params.steps, done=float(step * params.value))
    value = params.value
    for upstream in job.declaration.inputs:
        for path in sorted(job.input(upstream).rglob("value.txt")):
            value *= int(path.read_text())
    (job.output / "value.txt").write_text(str(value))
    (job.output / "picture.svg").write_text("<svg/>")
    job.show("picture.svg")
    job.measured(speed=12.5)
    mark("end", job.node)
    return {"value": value} | ({"humaneval.pass@1": 0.25} if Path("odd").exists() else {})
'''

STAGE = """
from stages.contract import Stage
from stages.toy import Params, run

STAGE = Stage("{name}", Params, run)
"""


@dataclass(frozen=True)
class Project:
    """A folder in which `python -m flows` works."""

    root: Path

    def params(self, **changes: Any) -> str:
        """The text of params.yaml with changes: seed={"value": 4}, teachers=["smollm2-135m"]."""
        params = yaml.safe_load((self.root / "params.yaml").read_text(encoding="utf-8"))
        for key, value in changes.items():
            params[key] = {**params[key], **value} if isinstance(value, dict) else value
        return yaml.safe_dump(params, sort_keys=False)

    def set(self, **changes: Any) -> None:
        """Change params.yaml, as `params` does."""
        (self.root / "params.yaml").write_text(self.params(**changes), encoding="utf-8")

    def trouble(self, node: str, *starts: str) -> None:
        """What happens to the next starts of a stage, in their order."""
        path = self.root / "trouble" / node
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(starts), encoding="utf-8")

    def marks(self) -> list[str]:
        """What the stages did, in order: "start seed", "end seed", ..."""
        path = self.root / "marks"
        return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []

    def hold(self) -> None:
        """Let steps take their time from now on."""
        (self.root / "hold").touch()

    def let_go(self) -> None:
        """Let steps take no time from now on."""
        (self.root / "hold").unlink()

    def value(self, node: str = "join") -> int:
        """The metric `value` that a node published."""
        path = self.root / "metrics" / f"{node.replace('@', '/')}.json"
        return json.loads(path.read_text(encoding="utf-8"))["value"]

    def curve(self, node: str) -> Path:
        """The newest metrics.jsonl of a node."""
        files = (self.root / "scratch" / node).glob("*/metrics.jsonl")
        return max(files, key=lambda path: path.stat().st_mtime_ns)

    def dvc(self, *arguments: str) -> None:
        """Run DVC's command line; fails with what it printed."""
        command = [sys.executable, "-m", "dvc", "--quiet", *arguments]
        done = subprocess.run(command, cwd=self.root, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    def start(self, *command: str, **options: Any) -> subprocess.Popen:
        """Start python with these arguments in the project."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
        return subprocess.Popen([sys.executable, *command], cwd=self.root, **pipes)

    def flows(self, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess:
        """Run `python -m flows ...` in the project to its end."""
        process = self.start("-m", "flows", *arguments, stdin=subprocess.PIPE)
        try:
            out, err = process.communicate(stdin, timeout=4 * DEADLINE_S)
        finally:
            process.kill()
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def make_project(folder: Path) -> Project:
    """Write the project; nothing in it ever ran."""
    for package in ("flows", "registry", "modeling"):
        shutil.copytree(REPOSITORY / package, folder / package, ignore=_caches)
    (folder / "stages").mkdir()
    for module in (REPOSITORY / "stages").glob("*.py"):
        shutil.copy(module, folder / "stages")
    files = {"dvc.yaml": DVC, "params.yaml": PARAMS, "stages/toy.py": TOY, ".dvc/config": ""}
    files["presets/small.yaml"] = PARAMS
    files["presets/large.yaml"] = PARAMS.replace("small", "large").replace("steps: 5", "steps: 9")
    for name in ("seed", "leaf", "join"):
        files[f"stages/{name}/__init__.py"] = ""
        files[f"stages/{name}/stage.py"] = STAGE.format(name=name)
    for name in (".dvc/config", ".dvcignore", ".gitignore"):
        files[name] = (REPOSITORY / name).read_text(encoding="utf-8")
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    return Project(folder)


def copy_project(project: Project, folder: Path) -> Project:
    """Give a copy of a project, with all that it has run."""
    shutil.copytree(project.root, folder, symlinks=True, dirs_exist_ok=True)
    return Project(folder)


def snapshot(folder: Path) -> dict[str, tuple[int, str]]:
    """Time of change and checksum of everything below a folder, but compiled Python."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if "__pycache__" not in path.parts:
            content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
            when = path.stat().st_mtime_ns if content else 0  # a folder's changes with __pycache__
            found[path.relative_to(folder).as_posix()] = (when, content)
    return found


def wait_for(condition: Callable[[], object], what: str) -> None:
    """Poll until a condition holds."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.05)


def processes_in(folder: Path) -> dict[int, str]:
    """The other processes that work in a folder: pid -> command line. Linux."""
    found = {}
    for process in set(Path("/proc").glob("[0-9]*")) - {Path("/proc", str(os.getpid()))}:
        try:
            if os.readlink(process / "cwd") == str(folder):
                found[int(process.name)] = (process / "cmdline").read_bytes().decode()
        except OSError:  # it has ended, or is not ours to look into
            continue
    return found


def _caches(_folder: str, names: list[str]) -> list[str]:
    return [name for name in names if name == "__pycache__"]
