"""--status: what is done, what is stale, what is half done, and who is running."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from flows.console import number, read_steps
from flows.lock import Holder
from flows.plan import Node, read_metrics, read_nodes


def show_status(root: Path, console: Console) -> None:
    """Print one row a stage and the holder of the lock."""
    table = Table(title="status", title_justify="left", expand=False)
    for column in ("stage", "state", "headline metric", "unfinished work"):
        table.add_column(column, overflow="fold")
    for node in read_nodes(root):
        state = f"stale: {node.reasons[0]}" if node.reasons else "up to date"
        value = read_metrics(root, node).get(node.headline)
        headline = f"{node.headline} {number(value)}" if value is not None else ""
        table.add_row(node.name, state, headline, unfinished(root, node))
    console.print(table)
    holder = Holder.read(root / ".pipeline.lock")
    if holder and holder.may_be_running():
        console.print(f"running: {holder.describe()}", highlight=False)


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
