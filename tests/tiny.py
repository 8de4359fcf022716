"""Small real things to test with: language models of some thousand parameters, a project to run.

    tiny_llama(), tiny_gpt2(), tiny_mamba()   random weights, float32, evaluation mode, on the CPU
    make_project(tmp_path)                    a folder in which `python -m stages walk` works

torch is imported by those functions only that need it.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[1]


# --- models ----------------------------------------------------------------------------------


def tiny_llama(blocks: int = 3, width: int = 32, vocab: int = 97, seed: int = 0):
    """A LlamaForCausalLM with grouped query attention: 4 heads, 2 key/value heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocab,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=0,
    )
    return _random(LlamaForCausalLM, config, seed)


def tiny_gpt2(blocks: int = 3, width: int = 32, vocab: int = 97, seed: int = 0):
    """A GPT2LMHeadModel: learned positions, LayerNorm, tied embeddings."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=width,
        n_layer=blocks,
        n_head=4,
        n_positions=128,
        vocab_size=vocab,
        bos_token_id=0,
        eos_token_id=0,
    )
    return _random(GPT2LMHeadModel, config, seed)


def tiny_mamba(blocks: int = 3, width: int = 32, vocab: int = 97, seed: int = 0):
    """A MambaForCausalLM: state space blocks, no attention; slow kernels, but tiny."""
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        hidden_size=width,
        num_hidden_layers=blocks,
        vocab_size=vocab,
        state_size=4,
        time_step_rank=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return _random(MambaForCausalLM, config, seed)


def _random(kind: type, config: Any, seed: int):
    """Weights ten times larger than a fresh model's, so that every block makes a difference."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config.initializer_range = 0.2
        model = kind(config)
    return model.float().eval().requires_grad_(False)


# --- a project -------------------------------------------------------------------------------

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
    """Write a project whose stage `walk` has these parameters instead of PARAMS's."""
    params = {**PARAMS, "walk": {**PARAMS["walk"], **walk}}
    files = {
        "dvc.yaml": DVC,
        "params.yaml": yaml.safe_dump(params),
        "stages/__init__.py": PACKAGE,
        "stages/walk/__init__.py": "",
        "stages/walk/stage.py": WALK,
        "stages/total/__init__.py": "",
        "stages/total/stage.py": TOTAL,
        "stages/view/__init__.py": "",
        "stages/view/stage.py": VIEW,
        "viewers.yaml": yaml.safe_dump({"ada": {"age": 36}, "ben": {"age": 25}}),
    }
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return Project(folder)
