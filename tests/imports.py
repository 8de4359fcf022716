"""What a Python file imports, read without running it: for the tests of the architecture."""

import ast
from functools import lru_cache
from pathlib import Path

from tests.tiny import REPOSITORY

PACKAGES = ("registry", "modeling", "runtime", "stages", "flows", "apps")  # some are to come
WRITTEN = {"artifacts", "scratch", "mlruns", "metrics", "__pycache__"}  # by runs


@lru_cache
def parse(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def python_files(folder: Path = REPOSITORY) -> list[Path]:
    """Every Python file of ours below a folder: nothing hidden, nothing that a run has written."""
    files = sorted(folder.glob("*.py"))
    for inner in sorted(path for path in folder.glob("*/") if path.is_dir()):
        if not inner.name.startswith(".") and inner.name not in WRITTEN:
            files += python_files(inner)
    return files


def imports_of(tree: ast.Module, package: str) -> dict[str, int]:
    """Dotted names that a module of `package` imports, wherever it does: name -> line.

    `from a.b import c` counts as a.b.c, whether c is a module or something in one.
    """
    found: dict[str, int] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name: node.lineno for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level]
            base = ".".join([*(above if node.level else []), *filter(None, [node.module])])
            found |= {f"{base}.{alias.name}": node.lineno for alias in node.names}
    return found


def imports_in(path: Path) -> dict[str, int]:
    """Dotted names that a file of the repository imports: name -> line."""
    return imports_of(parse(path), ".".join(path.relative_to(REPOSITORY).parent.parts))


def file_of(name: str) -> Path | None:
    """The file of ours that a dotted name stands for or lies in; None for anything else.

    stages.formats.targets.Header -> stages/formats/targets.py; modeling -> modeling/__init__.py
    """
    parts = name.split(".")
    if parts[0] not in PACKAGES:
        return None
    for length in range(len(parts), 0, -1):
        path = REPOSITORY.joinpath(*parts[:length])
        for candidate in (path.with_suffix(".py"), path / "__init__.py"):
            if candidate.is_file():
                return candidate
    return None


def lies_in(name: str, package: str) -> bool:
    """Whether a dotted name is a package or something in it."""
    return name == package or name.startswith(package + ".")
