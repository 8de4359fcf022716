"""Functions and classes of Python's standard library, read from its source; nothing is imported.

What is there depends on the Python version that prepare runs under, as `python-docs` does.
"""

import ast
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import dropwhile
from pathlib import Path

from stages.prepare.sources import LEFT_OUT

NOT_READ = LEFT_OUT | {"distutils", "encodings", "pydoc_data"}  # removed in 3.12; tables; texts
MOST_CODE_LINES = 25  # of a body
NO_PROSE = re.compile(r"->|>>>|^\s*(?:[-*+|:@#=]|\d+[.)])|\w+\s*[:=]\s*$", re.MULTILINE)
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z`'\"(])")

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Documented:
    """A public function or class with a docstring that begins with prose.

    module: dotted, e.g. "email.utils".  paragraph: the docstring's first one, on one line.
    signature: "name(arguments)", and code: the definition without its docstring, of functions
    alone; None of what would teach nothing to write (classes, coroutines, empty or long bodies).
    """

    module: str
    name: str
    paragraph: str
    signature: str | None
    code: str | None

    @property
    def top(self) -> str:
        """The module that one imports first: "email" of "email.utils"."""
        return self.module.partition(".")[0]

    @property
    def full_name(self) -> str:
        """The dotted name that one finds it by."""
        return f"{self.module}.{self.name}"

    @property
    def summary(self) -> str:
        """The first sentence."""
        return SENTENCE_END.split(self.paragraph, maxsplit=1)[0]


@lru_cache
def documented() -> tuple[Documented, ...]:
    """Give all of them, by file; a name that a module defines twice counts as its last."""
    library = Path(sysconfig.get_paths()["stdlib"])
    found = {}
    for path in sorted(library.rglob("*.py")):
        place = path.relative_to(library)
        names = [name for name in place.with_suffix("").parts if name != "__init__"]
        hidden = any(name.startswith("_") for name in names)
        if names and not hidden and NOT_READ.isdisjoint(place.parts):
            found |= {item.full_name: item for item in in_module(path, ".".join(names))}
    return tuple(found.values())


def in_module(path: Path, module: str) -> Iterator[Documented]:
    """Give what one file defines at its top level."""
    try:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError):  # the library keeps a few broken files for its tests
        return
    lines = source.splitlines()
    for node in tree.body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            paragraph = first_paragraph(node)
            if paragraph:
                is_function = isinstance(node, ast.FunctionDef)
                code = code_of(node, lines) if is_function else None
                signature = f"{node.name}({ast.unparse(node.args)})" if code else None
                yield Documented(module, node.name, paragraph, signature, code)


def first_paragraph(node: Definition) -> str | None:
    """A docstring's first paragraph on one line, as a sentence; None where it is not prose."""
    text = (ast.get_docstring(node) or "").strip()
    first = re.split(r"\n\s*\n", text, maxsplit=1)[0]
    words = first.replace("``", "`").split()
    if len(words) < 3 or not words[0][0].isalpha() or NO_PROSE.search(first):
        return None
    if words[0].startswith(f"{node.name}(") or first.count("`") % 2 or "```" in first:
        return None  # a signature, or a quotation that the paragraph does not close
    line = " ".join(words)
    if re.match(r"[a-z]+ ", line):
        line = line[0].upper() + line[1:]
    return line if line[-1] in ".!?" else f"{line}."


def code_of(node: ast.FunctionDef, lines: list[str]) -> str | None:
    """A short function's source without its docstring; None where nothing else is in it.

    lines: of the whole file.
    """
    docstring, *body = node.body
    is_long = node.end_lineno - docstring.end_lineno > MOST_CODE_LINES
    if is_long or all(isinstance(line, ast.Pass | ast.Raise) for line in body):
        return None
    first = min([node.lineno, *(mark.lineno for mark in node.decorator_list)]) - 1
    rest = lines[docstring.end_lineno : node.end_lineno]
    kept = [*lines[first : docstring.lineno - 1], *dropwhile(lambda line: not line.strip(), rest)]
    code = "\n".join(line.rstrip() for line in kept)
    node.body = body
    return code if _same(code, node) else None


def _same(code: str, node: ast.FunctionDef) -> bool:
    """Whether cutting lines has left the function as it was, e.g. not `def f(): "..."; g()`."""
    try:
        return ast.dump(ast.parse(code)) == ast.dump(ast.Module([node], []))
    except SyntaxError:
        return False
