"""The real DAG in a folder of its own, with a tiny teacher: stages run whole, in this process.

dvc.yaml, registry and code are the real ones. The teacher is a llama of eight small blocks that
lies where `modeling.loading` keeps the converted weights of smollm2-135m; rows and profile are
made here, so that extract and distill can run without prepare and profile.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from modeling.loading import CONVERSION
from registry.catalog import lookup
from stages.__main__ import find_stage
from stages.contract import Job
from stages.declaration import read_declaration
from stages.digests import write_manifest
from stages.formats.importance import BlockImportance, write_importance
from stages.formats.tokens import write_rows, write_tokenizer
from stages.params import read_section
from stages.process import StopRequest
from tests.stages.lessons import rows, subspaces_of
from tests.tiny import REPOSITORY, tiny_llama

TEACHER, BLOCKS = "smollm2-135m", 8
HARMS = (9.0, 8.0, 7.0, 6.0, 3.0, 0.2, 0.3, 0.4)  # 5, 6 and 7 go when three do
PARAMS = {
    "extract": {
        "answers": "top_k", "top_k": 16, "samples": 20, "prefix_depth": 0.333,
        "anchors": 3, "batch_rows": 2, "shard_rows": 4,
        "engine": "resident", "seed": 0,
    },
    "distill": {
        "student": "pruned-27", "search_rows": 2, "search_width": 0,
        "patch_rows": 6, "patch_ridge": 0.1, "steps": 6, "batch_rows": 3,
        "learning_rate": 3e-3, "warmup": 0.1, "clip": 1.0, "temperature": 1.0, "kd_weight": 1.0,
        "ce_weight": 0.2, "anchor_weight": 0.5, "validation_rows": 2, "validate_every": 3,
        "spike": 3.0, "regression": 0.25, "controls": ["text_only"], "fast_path": True,
        "schedule": "mixed", "teacher_order": [], "teacher_weights": [], "protect": True,
        "replay_share": 0.25, "protect_share": 0.95, "protect_rows": 4, "retention_rows": 2,
        "processes": 1, "gradient_checkpointing": False, "optimizer": "adamw", "seed": 0,
    },
}  # fmt: skip


class StopAt(StopRequest):
    """Asks to stop as soon as a step of a phase is done."""

    def __init__(self, phase: str, step: int) -> None:
        super().__init__()
        self.at = (phase, step)

    def watch(self, job: Job) -> None:
        """Look at what is reported to the job's progress."""
        add = job.progress.add

        def watched(phase: str, step: int, *rest: Any) -> None:
            add(phase, step, *rest)
            self.requested = (phase, step) == self.at

        job.progress.add = watched


@dataclass(frozen=True)
class TinyDag:
    """A folder with the real dvc.yaml and registry, small parameters, and finished inputs."""

    root: Path

    def set(self, stage: str, **values: Any) -> None:
        """Change values of a stage's section of params.yaml."""
        params = yaml.safe_load((self.root / "params.yaml").read_text(encoding="utf-8"))
        params[stage] |= values
        (self.root / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")

    def run(
        self, stage: str, stop: StopAt | None = None, teacher: str = TEACHER
    ) -> dict[str, float]:
        """Run a stage to its end and publish it; give its metrics."""
        item = teacher if stage in ("profile", "extract") else None
        job = Job(self.root, read_declaration(self.root, stage, item), stop or StopRequest())
        if stop:
            stop.watch(job)
        declared = find_stage(stage)
        params = read_section(self.root / "params.yaml", stage, declared.params)
        metrics = declared.run(params, job)
        job.complete(metrics, {})
        job.publish()
        return metrics

    def published(self, stage: str) -> dict[str, bytes]:
        """The files of a stage's output, by name."""
        folder = self.root / "artifacts" / stage
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}

    @property
    def teacher_folder(self) -> Path:
        """Where the teacher lies."""
        sha256 = lookup("teachers", TEACHER).package.sha256
        name = f"{TEACHER}-{sha256[:16]}-{CONVERSION}"
        return self.root / "cache" / "models" / name


def make_tiny_dag(root: Path, patch: pytest.MonkeyPatch) -> TinyDag:
    """Write teacher, rows and profile into a folder, and let the cache of models be there."""
    dag = TinyDag(root)
    patch.setenv("NANOFOUNDRY_CACHE", str(root / "cache"))
    pyc = shutil.ignore_patterns("__pycache__")
    for name in ("stages", "modeling", "registry"):  # copies: what a test writes stays its own
        shutil.copytree(REPOSITORY / name, root / name, ignore=pyc)
    shutil.copy(REPOSITORY / "dvc.yaml", root)
    (root / "params.yaml").write_text(yaml.safe_dump(PARAMS), encoding="utf-8")
    model = tiny_llama(blocks=BLOCKS).bfloat16()
    model.save_pretrained(dag.teacher_folder)
    _tokenizer().save_pretrained(dag.teacher_folder)

    prepared = root / "artifacts/prepare"
    for split, count in (("train", 10), ("calibration", 6), ("heldout", 4)):
        write_rows(prepared, split, "docs", rows(count, start=len(split)).numpy())
    write_tokenizer(prepared, TEACHER, _tokenizer())
    write_manifest(prepared)

    profile = root / "artifacts/profile" / TEACHER
    profile.mkdir(parents=True)
    found = [BlockImportance(n, harm, 0.0, 10.0, 0.1, 1, 2, 3) for n, harm in enumerate(HARMS)]
    with torch.no_grad():
        write_importance(profile, found, subspaces_of(model, rows(6)))
    write_manifest(profile)
    return dag


def _tokenizer():
    """A tokenizer of 97 words, w0 to w95 and one that ends a document."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<eos>": 0} | {f"w{number}": number + 1 for number in range(96)}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<eos>")
