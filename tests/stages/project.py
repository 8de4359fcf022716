"""A folder in which `python -m stages walk` works on top of the real contract, to look into.

make_project writes it; what its stages are and which trouble they take is in tests/stages/walk.py.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.stages import walk as texts
from tests.tiny import REPOSITORY

DONE, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 3


@dataclass(frozen=True)
class Project:
    """A folder with dvc.yaml, params.yaml and stages of its own, on top of the real contract."""

    root: Path

    def set(self, section: str, **values: Any) -> None:
        """Change values of one section of params.yaml."""
        path = self.root / "params.yaml"
        params = yaml.safe_load(path.read_text(encoding="utf-8"))
        params[section] |= values
        path.write_text(yaml.safe_dump(params), encoding="utf-8")

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen:
        """Start `python -m stages ...` in the project."""
        return subprocess.Popen(
            [sys.executable, "-m", "stages", *arguments],
            cwd=self.root,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        """Run `python -m stages ...` in the project to its end."""
        process = self.start(*arguments, **environment)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def outcome(self, node: str = "walk") -> dict[str, Any]:
        """What scratch/NODE/outcome.json says."""
        return json.loads((self.root / "scratch" / node / "outcome.json").read_text("utf-8"))

    def work(self, node: str = "walk") -> list[Path]:
        """The folders of work in progress of a node, one a fingerprint, the oldest first."""
        folders = [path for path in (self.root / "scratch" / node).iterdir() if path.is_dir()]
        return sorted(folders, key=lambda path: path.stat().st_mtime_ns)

    def curve(self, node: str = "walk") -> list[dict[str, Any]]:
        """The lines of the newest metrics.jsonl, without the time they were written at."""
        text = (self.work(node)[-1] / "metrics.jsonl").read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines()]
        return [{key: line[key] for key in line if key != "time_s"} for line in lines]

    def steps(self, node: str = "walk") -> list[int]:
        """The steps of the newest metrics.jsonl."""
        return [line["step"] for line in self.curve(node)]

    def published(self, folder: str = "artifacts") -> dict[str, bytes]:
        """The files below a folder of the project, by name; hidden ones too."""
        files = [path for path in sorted((self.root / folder).rglob("*")) if path.is_file()]
        return {path.relative_to(self.root).as_posix(): path.read_bytes() for path in files}

    def job(self, stage: str = "walk", item: str | None = None, stop: Any = None):
        """A Job of one of its stages in this process; `stop` is a StopRequest."""
        from stages.contract import Job
        from stages.declaration import read_declaration
        from stages.process import StopRequest

        return Job(self.root, read_declaration(self.root, stage, item), stop or StopRequest())


def make_project(folder: Path, **walk: Any) -> Project:
    """Write a project whose stage `walk` has these parameters instead of the usual ones."""
    params = {**texts.PARAMS, "walk": {**texts.PARAMS["walk"], **walk}}
    files = {
        "dvc.yaml": texts.DVC,
        "params.yaml": yaml.safe_dump(params),
        "stages/__init__.py": texts.PACKAGE,
        "stages/walk/__init__.py": "",
        "stages/walk/stage.py": texts.WALK,
        "stages/total/__init__.py": "",
        "stages/total/stage.py": texts.TOTAL,
        "stages/view/__init__.py": "",
        "stages/view/stage.py": texts.VIEW,
        "viewers.yaml": yaml.safe_dump({"ada": {"age": 36}, "ben": {"age": 25}}),
    }
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return Project(folder)


def assert_same_result(project: Project, other: Project) -> None:
    """The same published bytes, the same metrics and the same curve."""
    assert project.published() == other.published()
    assert project.published("metrics") == other.published("metrics")
    assert project.curve() == other.curve()


def wait_for(condition: Callable[[], object], what: str) -> None:
    """Poll until a condition holds; half a minute is far more than it ever takes."""
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError(f"waited in vain for {what}")


def checkpoints(project: Project) -> set[str]:
    """The names of the checkpoints of `walk` there are now."""
    return {path.name for path in project.root.glob("scratch/walk/*/checkpoints/main/step-*")}


class Counter:
    """The smallest state: a number in a file."""

    def __init__(self) -> None:
        self.count = 0

    def save(self, folder: Path) -> None:
        (folder / "count.txt").write_text(str(self.count))

    def load(self, folder: Path) -> None:
        self.count = int((folder / "count.txt").read_text())
