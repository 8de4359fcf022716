"""--status: what is done, what is stale, what is half done, who is running, and what it can do."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from flows.console import number, read_steps
from flows.lock import Holder
from flows.plan import Node, read_metrics, read_nodes

CAPABILITIES = "artifacts/benchmark/capabilities.json"  # stages/benchmark/capabilities.py
SCORES = ("score", "score_routed", "score_alone")
TITLE = "capabilities: tokens of right replies that the student names first"


def show_status(root: Path, console: Console) -> None:
    """Print one row a stage, one a capability, and the holder of the lock."""
    table = Table(title="status", title_justify="left", expand=False)
    for column in ("stage", "state", "headline metric", "unfinished work"):
        table.add_column(column, overflow="fold")
    for node in read_nodes(root):
        state = f"stale: {node.reasons[0]}" if node.reasons else "up to date"
        value = read_metrics(root, node).get(node.headline)
        headline = f"{node.headline} {number(value)}" if value is not None else ""
        table.add_row(node.name, state, headline, unfinished(root, node))
    console.print(table)
    if (manifest := root / CAPABILITIES).is_file():
        console.print(capabilities(json.loads(manifest.read_text(encoding="utf-8"))))
    holder = Holder.read(root / ".pipeline.lock")
    if holder and holder.may_be_running():
        console.print(f"running: {holder.describe()}", highlight=False)


def capabilities(records: list[dict[str, Any]]) -> Table:
    """What the student can do, by the last benchmark: one row a capability."""
    table = Table(title=TITLE, title_justify="left", expand=False)
    for column in ("capability", "tier", "rank", "MiB", "own adapter", "routed", "none", "teacher"):
        table.add_column(column, overflow="fold")
    for one in records:
        size = "no adapter" if one["bytes"] is None else f"{one['bytes'] / 2**20:.1f}"
        rank = "" if one["rank"] is None else str(one["rank"])
        shares = (_share(one[key]) for key in SCORES)
        table.add_row(one["name"], one["tier"], rank, size, *shares, one["teacher"])
    return table


def _share(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.1%}"


def unfinished(root: Path, node: Node) -> str:
    """How far unfinished work of a node has come, from its metrics."""
    files = (root / "scratch" / node.name).glob("*/metrics.jsonl")
    found = [path for path in files if path.parent.name != "last"]
    notes = []
    for path in found:
        steps = read_steps(path)
        if steps:
            last = steps[-1]
            notes.append(f"{last['phase']} {last['step']}/{last['total']}")
    return ", ".join(notes)
