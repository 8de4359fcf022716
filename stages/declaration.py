"""What dvc.yaml says of one stage: its inputs, outputs and parameters.

dvc.yaml is the only place where an edge of the DAG is written. DVC reads it to decide what must
run; a stage reads its own entry here, so that it can refuse an input that was never declared.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ARTIFACTS = "artifacts/"


@dataclass(frozen=True)
class Declaration:
    """One node of the DAG, with the `${item}` of a `foreach` filled in."""

    node: str  # "distill", or "profile@smollm2-135m"
    stage: str  # the folder below stages/
    item: str | None  # what a `foreach` runs over: a teacher's name
    deps: tuple[str, ...]
    params: tuple[tuple[str, tuple[str, ...]], ...]  # (file, keys)
    out: str  # artifacts/...
    metrics: str  # metrics/....json

    @property
    def inputs(self) -> dict[str, str]:
        """Upstream stage -> its artifact path, as declared."""
        found = (dep for dep in self.deps if dep.startswith(ARTIFACTS))
        return {dep.removeprefix(ARTIFACTS).split("/")[0]: dep for dep in found}

    @property
    def code(self) -> tuple[str, ...]:
        """The files and folders whose content makes the result, besides the inputs."""
        return tuple(dep for dep in self.deps if not dep.startswith(ARTIFACTS))


def read_declaration(root: Path, stage: str, item: str | None) -> Declaration:
    """Find a stage in dvc.yaml; raises ValueError when it is not there or not of the one shape."""
    stages = yaml.safe_load((root / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    if stage not in stages:
        raise ValueError(f"dvc.yaml has no stage '{stage}'; it has {', '.join(stages)}")
    entry = stages[stage]
    if ("foreach" in entry) != (item is not None):
        need = "needs a teacher's name" if "foreach" in entry else "takes no name"
        raise ValueError(f"stage '{stage}' {need}: python -m stages {stage} [TEACHER]")
    entry = _fill(entry.get("do", entry), item, root)
    return Declaration(
        node=stage if item is None else f"{stage}@{item}",
        stage=stage,
        item=item,
        deps=tuple(entry["deps"]),
        params=tuple(_params(entry.get("params", []))),
        out=_only(entry["outs"]),
        metrics=_only(entry["metrics"]),
    )


def _fill(value: Any, item: str | None, root: Path) -> Any:
    """Replace `${item}` and `${section.key}` as DVC's templating does."""
    if isinstance(value, dict):
        return {_fill(key, item, root): _fill(inner, item, root) for key, inner in value.items()}
    if isinstance(value, list):
        return [_fill(inner, item, root) for inner in value]
    if not isinstance(value, str) or "${" not in value:
        return value
    before, _, rest = value.partition("${")
    name, _, after = rest.partition("}")
    if name == "item":
        return _fill(f"{before}{item}{after}", item, root)
    found = yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8"))
    for key in name.split("."):
        found = found[key]
    return _fill(f"{before}{found}{after}", item, root)


def _params(entries: list[Any]) -> list[tuple[str, tuple[str, ...]]]:
    own = tuple(entry for entry in entries if isinstance(entry, str))
    files = [pair for entry in entries if isinstance(entry, dict) for pair in entry.items()]
    return [("params.yaml", own)] + [(file, tuple(keys)) for file, keys in files]


def _only(entries: list[Any]) -> str:
    """The one path of `outs` or `metrics`, written plain or with options below it."""
    (entry,) = entries
    return entry if isinstance(entry, str) else next(iter(entry))
