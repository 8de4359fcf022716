"""DVC's graph and status -> what has to run, in which order, and why.

The only module that imports DVC's Python API (its stages run through its command line). Internals
that it leans on: Repo.index.graph, Stage.deps/outs, Dependency.status, StageCache; the version is
pinned in constraints.txt, and tests/flows/test_plan.py fails when one of them changes.
"""

import contextlib
import io
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Node:
    """One node of the DAG: a stage, or a stage for one teacher.

    reasons: why it is stale; empty means that what dvc.lock records is in place.
    restorable: stale, but DVC's run cache has the result for what it would run with.
    """

    name: str  # "distill", "profile@smollm2-135m"
    stage: str
    description: str
    headline: str  # the metric that stands for the stage in tables
    upstream: tuple[str, ...]
    reasons: tuple[str, ...]
    restorable: bool
    out: str
    metrics: str

    @property
    def is_stale(self) -> bool:
        """Whether it has to run, or to be restored from the run cache."""
        return bool(self.reasons)


class BrokenPipelineFile(ValueError):
    """dvc.yaml or dvc.lock cannot be read."""


class UnknownStage(ValueError):
    """A stage that is not in the DAG; the message lists those that are."""


def read_nodes(root: Path, params_text: str | None = None) -> list[Node]:
    """Give all nodes, upstream before downstream.

    params_text: what params.yaml would hold, for a plan that touches nothing; None reads the file.
    Raises BrokenPipelineFile with DVC's own words.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with contextlib.chdir(root), Repo(str(root)) as repo:  # DVC names stages from here
            if params_text is not None:
                repo.fs = _with_params(root / "params.yaml", params_text)
            return _nodes(repo, root)
    except DvcException as error:
        raise BrokenPipelineFile(f"DVC cannot read the pipeline: {error}") from error


def select_nodes(nodes: list[Node], only: str | None, start: str | None) -> list[Node]:
    """Choose what a run is about: one stage, a stage and all behind it, or everything.

    Raises UnknownStage; for `only`, FileNotFoundError when an input is not there, naming the stage
    to run first.
    """
    if only is not None:
        chosen = named_nodes(nodes, only)
        names = {node.name for node in chosen}
        by_name = {node.name: node for node in nodes}
        for node in chosen:
            for name in node.upstream:
                if name not in names and not Path(by_name[name].out).exists():
                    raise FileNotFoundError(
                        f"stage '{node.name}' needs {by_name[name].out}, which is not there; "
                        f"run that first: ./run_pipeline.sh --stage {by_name[name].stage}"
                    )
        return chosen
    if start is not None:
        names = {node.name for node in named_nodes(nodes, start)}
        for node in nodes:  # upstream comes first
            if not names.isdisjoint(node.upstream):
                names.add(node.name)
        return [node for node in nodes if node.name in names]
    return nodes


def named_nodes(nodes: list[Node], name: str) -> list[Node]:
    """The nodes of a stage, or the one node of that name; raises UnknownStage."""
    chosen = [node for node in nodes if name in (node.stage, node.name)]
    if not chosen:
        stages = list(dict.fromkeys(node.stage for node in nodes))
        raise UnknownStage(f"unknown stage '{name}'; the stages are {', '.join(stages)}")
    return chosen


def remove_strays(root: Path, nodes: list[Node]) -> list[str]:
    """Delete outputs for teachers that are no longer asked for; DVC's cache keeps their content."""
    outs = {root / node.out for node in nodes if "@" in node.name}
    strays = sorted(
        path
        for folder in {out.parent for out in outs}
        for path in folder.glob("*")
        if path.is_dir() and not path.is_symlink() and path not in outs
    )
    for stray in strays:
        shutil.rmtree(stray)
        metrics = root / "metrics" / stray.parent.name / f"{stray.name}.json"
        metrics.unlink(missing_ok=True)
    return [str(stray.relative_to(root)) for stray in strays]


def repair_lockfile(root: Path) -> str | None:
    """Put back a dvc.lock that a kill cut short, from the copy kept after the last good state.

    DVC writes it in place. Gives a sentence when something was repaired.
    """
    lock, good = root / "dvc.lock", root / ".dvc" / "tmp" / "dvc.lock.good"
    if not lock.exists():  # cut short it would be there: somebody deleted it
        return None
    known = _stages_of(good)
    found = _stages_of(lock)
    missing = set(known or {}) - set(found or {})
    if found is not None and not missing and _stage_names(lock) == set(found):
        return None
    if known is None and found is None:
        return None
    merged = {"schema": "2.0", "stages": {**(known or {}), **(found or {})}}
    lock.write_text(yaml.safe_dump(merged, sort_keys=False), encoding="utf-8")
    return f"dvc.lock was cut short by a kill; restored {', '.join(sorted(missing)) or 'it'}"


def keep_lockfile(root: Path) -> None:
    """Remember the present dvc.lock as good; to be called while no DVC is writing it."""
    lock, good = root / "dvc.lock", root / ".dvc" / "tmp" / "dvc.lock.good"
    if _stages_of(lock) is not None:
        good.parent.mkdir(parents=True, exist_ok=True)
        part = good.with_suffix(".part")
        shutil.copyfile(lock, part)
        part.replace(good)


def clear_dead_locks(root: Path) -> None:
    """Remove DVC's rwlock that a killed DVC left; only while holding the pipeline's lock.

    DVC forgets entries of dead processes by itself, but refuses to start on a torn file, and takes
    any live process of the same number for the old one.
    """
    (root / ".dvc" / "tmp" / "rwlock").unlink(missing_ok=True)


def repair_run_cache(root: Path) -> None:
    """Remove entries of DVC's run cache that a kill left empty or torn: DVC fails on both."""
    for entry in (root / ".dvc" / "cache" / "runs").glob("*/*"):
        for file in entry.iterdir():
            if _yaml_of(file) is None:
                file.unlink()
        if not any(entry.iterdir()):
            entry.rmdir()


def _yaml_of(path: Path) -> Any:
    """The content of a YAML file; None when it is absent, empty or cannot be read."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, yaml.YAMLError, UnicodeDecodeError):
        return None


def _nodes(repo: Any, root: Path) -> list[Node]:
    import networkx

    graph = repo.index.graph  # an edge leads from a stage to what it depends on
    stages = networkx.lexicographical_topological_sort(graph.reverse(), lambda s: s.addressing)
    return [_node(stage, repo, root, graph) for stage in stages]


def _node(stage: Any, repo: Any, root: Path, graph: Any) -> Node:
    reasons = tuple(_reasons(stage, root))
    outs = [out for out in stage.outs if not out.metric]
    metrics = [out for out in stage.outs if out.metric]
    return Node(
        name=stage.addressing,
        stage=stage.addressing.split("@")[0],
        description=stage.desc or "",
        headline=(stage.meta or {}).get("headline", ""),
        upstream=tuple(sorted(other.addressing for other in graph.successors(stage))),
        reasons=reasons,
        restorable=bool(reasons) and _in_run_cache(stage, repo),
        out=outs[0].def_path,
        metrics=metrics[0].def_path,
    )


def _reasons(stage: Any, root: Path) -> list[str]:
    """Why a stage is stale, in words."""
    if not any(out.hash_info for out in stage.outs):
        return ["never ran"]
    reasons = ["its command changed"] if stage.changed_stage() else []
    for dep in stage.deps:
        if not dep.status():
            continue
        if dep.hash_name == "params":
            reasons += _param_changes(dep)
        else:
            kind = "input" if dep.def_path.startswith("artifacts/") else "code"
            missing = "" if (root / dep.def_path).exists() else " (missing)"
            reasons.append(f"{kind} changed: {dep.def_path}{missing}")
    for out in stage.outs:
        if out.status():
            state = "changed" if (root / out.def_path).exists() else "missing"
            reasons.append(f"output {state}: {out.def_path}")
    return reasons


def _param_changes(dep: Any) -> list[str]:
    """Each value that differs from what dvc.lock has, as "section.key old -> new"."""
    from flows.settings import flat

    old = flat(dep.hash_info.value or {})
    new = flat(dep.read_params())
    where = "" if dep.def_path == "params.yaml" else f"{dep.def_path}: "
    return [
        f"{where}{key} {old.get(key, 'new')} -> {new.get(key, 'gone')}"
        for key in {**old, **new}
        if old.get(key) != new.get(key)
    ]


def _in_run_cache(stage: Any, repo: Any) -> bool:
    """Whether DVC has run this stage before with just these dependencies and kept the result."""
    if any(not dep.exists for dep in stage.deps):
        return False
    stage.save_deps()
    try:
        cached = repo.stage_cache._load(stage)
    except (TypeError, ValueError):  # how DVC fails on an entry that a kill left empty or torn
        return False
    if cached is None:
        return False
    return repo.stage_cache._create_stage(cached, wdir=stage.wdir).outs_cached()


def _with_params(path: Path, text: str) -> Any:
    """A file system on which params.yaml has another content."""
    from dvc_objects.fs.local import LocalFileSystem

    class WithParams(LocalFileSystem):
        def open(self, opened: str, mode: str = "r", **options: Any) -> Any:
            if os.path.abspath(opened) == str(path):
                return io.StringIO(text)
            return super().open(opened, mode=mode, **options)

    return WithParams()


def _stages_of(path: Path) -> dict[str, Any] | None:
    """The stages of a lock file; None when it is absent or cannot be read."""
    content = _yaml_of(path)
    stages = content.get("stages") if isinstance(content, dict) else None
    if not isinstance(stages, dict):
        return None
    return {name: entry for name, entry in stages.items() if _is_whole(entry)}


def _stage_names(path: Path) -> set[str]:
    """All names in a lock file, whole entries or not."""
    return set((_yaml_of(path) or {}).get("stages") or {})


def _is_whole(entry: Any) -> bool:
    """Whether an entry of dvc.lock has all that DVC writes: a cut may take its end away."""
    if not isinstance(entry, dict) or not entry.get("cmd") or not entry.get("outs"):
        return False
    hashed = [*(entry.get("deps") or []), *entry["outs"]]
    return all(
        isinstance(item, dict)
        and len(str(item.get("md5")).removesuffix(".dir")) == 32
        and isinstance(item.get("size"), int)
        for item in hashed
    ) and None not in (entry.get("deps", ()), entry.get("params", ()))


def read_metrics(root: Path, node: Node) -> dict[str, float]:
    """The published metrics of a node; empty when it never finished."""
    path = root / node.metrics
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
