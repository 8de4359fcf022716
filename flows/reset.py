"""--reset: delete results and unfinished work, after saying what and asking. Never mlruns."""

import shutil
from pathlib import Path

import yaml
from rich.console import Console

from flows.plan import Node, named_nodes, read_nodes, repair_lockfile, repair_run_cache


def reset(root: Path, name: str, yes: bool, console: Console) -> bool:
    """Delete what a stage ("all": every stage) has made; False when the person said no.

    Deletes outputs, metrics, checkpoints, the entry in dvc.lock and in DVC's run cache, so that the
    next run really starts anew. Raises UnknownStage.
    """
    repair_lockfile(root)
    nodes = read_nodes(root)
    chosen = nodes if name == "all" else named_nodes(nodes, name)
    doomed = [path for node in chosen for path in belongings(root, node) if path.exists()]
    doomed += run_cache_entries(root, chosen)
    if not doomed:
        console.print("there is nothing to delete")
        return True
    console.print("this will be deleted (mlruns stays):", highlight=False)
    for path in doomed:
        console.print(f"  {path.relative_to(root)}", highlight=False)
    if not yes and not agreed(console):
        console.print("nothing was deleted")
        return False
    for path in doomed:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    repair_run_cache(root)  # DVC fails on the empty folders that are left of its entries
    forget_in_lockfile(root, {node.name for node in chosen})
    return True


def agreed(console: Console) -> bool:
    """Ask; anything but a yes, and nobody there to answer, is a no."""
    try:
        return console.input("delete it? [y/N] ", markup=False).strip().lower() in {"y", "yes"}
    except EOFError:
        return False


def belongings(root: Path, node: Node) -> list[Path]:
    """Everything a node has made."""
    return [root / node.out, root / node.metrics, root / "scratch" / node.name]


def run_cache_entries(root: Path, nodes: list[Node]) -> list[Path]:
    """What DVC's run cache remembers of these nodes."""
    commands = {f"python -m stages {node.name.replace('@', ' ')}" for node in nodes}
    entries = (root / ".dvc" / "cache" / "runs").glob("*/*/*")
    return [entry for entry in entries if _command(entry) in commands]


def forget_in_lockfile(root: Path, names: set[str]) -> None:
    """Take nodes out of dvc.lock, and out of the copy that repairs it."""
    for path in (root / "dvc.lock", root / ".dvc" / "tmp" / "dvc.lock.good"):
        if path.is_file():
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
            kept = {key: entry for key, entry in content["stages"].items() if key not in names}
            path.write_text(yaml.safe_dump({**content, "stages": kept}, sort_keys=False))


def _command(entry: Path) -> str:
    return yaml.safe_load(entry.read_text(encoding="utf-8")).get("cmd", "")
