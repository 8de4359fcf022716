"""Short ways to ask for the plan of a project."""

from flows.plan import Node, read_nodes
from tests.flows.project import Project


def node(project: Project, name: str) -> Node:
    """One node of the plan as it is now."""
    (found,) = (node for node in read_nodes(project.root) if node.name == name)
    return found


def reasons(project: Project, text: str | None = None) -> dict[str, tuple[str, ...]]:
    """What is stale, and why; `text` is what params.yaml would hold."""
    return {node.name: node.reasons for node in read_nodes(project.root, text) if node.is_stale}


def restorable(project: Project) -> dict[str, bool]:
    """What is stale, and whether DVC's run cache has it."""
    return {node.name: node.restorable for node in read_nodes(project.root) if node.is_stale}
