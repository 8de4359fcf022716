"""The tool `py`: a small Python program in, what it prints or its last line's value out.

The program is compiled by `python_policy.py` and finds what `python_guards.py` gives it. That keeps
honest programs honest; what holds dishonest ones is the process that it runs in (`sandbox.py`).
The result is made of plain JSON types, looked at by their exact type: no method of the program's
own objects is called by what reads it.
"""

import json
import re
from typing import Any

from runtime.tools.python_guards import surroundings
from runtime.tools.python_policy import LAST_VALUE, compile_program

LONGEST_PRINTED = 20_000  # characters kept; the sandbox cuts the result to its own limit
DEEPEST, MOST_ELEMENTS = 20, 10_000  # of a value
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # differs from run to run, and tells where memory lies


class PrintedTooMuch(BaseException):
    """Raised by print() when enough has been printed: the program ends there."""


class _Paper:
    """What a program prints."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.left = LONGEST_PRINTED

    def _call_print(
        self, *objects: Any, sep: Any = " ", end: Any = "\n", file: Any = None, flush: Any = False
    ) -> None:
        if file is not None:
            raise TypeError("there is no file to print to")
        separator = " " if sep is None else str(sep)
        text = separator.join(map(str, objects)) + ("\n" if end is None else str(end))
        self.parts.append(text[: self.left])
        self.left -= len(text)
        if self.left < 0:
            raise PrintedTooMuch

    @property
    def text(self) -> str:
        return _ADDRESS.sub("", "".join(self.parts)).removesuffix("\n")


def run_program(code: str) -> tuple[Any, bool]:
    """A program's result as JSON, and whether output was cut.

    Printed text when something was printed, the last line's value when it has one, both as
    {"printed": ..., "value": ...} when there are both; null when there is neither. What the program
    raises goes through, as do SyntaxError for what is not allowed and every other error.
    """
    paper = _Paper()
    room = surroundings(lambda getattr: paper)
    cut = False
    try:
        exec(compile_program(code), room)
    except PrintedTooMuch:
        cut = True
    value = as_json(room.get(LAST_VALUE))
    if not paper.parts:
        return value, cut
    return (paper.text if value is None else {"printed": paper.text, "value": value}), cut


def as_json(value: Any) -> Any:
    """A value as JSON types; sets in order, what JSON has no word for as `<its type>`."""
    return _as_json(value, 0, [MOST_ELEMENTS])


def _as_json(value: Any, depth: int, left: list[int]) -> Any:
    left[0] -= 1
    if depth > DEEPEST or left[0] < 0:
        raise ValueError(
            f"the result is deeper than {DEEPEST}, or has over {MOST_ELEMENTS} elements"
        )
    kind = type(value)
    if value is None or kind in (bool, str):
        return value
    if kind is int:
        return value if value.bit_length() < 10_000 else f"{value.bit_length()} bits"
    if kind is float:
        return value if value - value == 0 else str(value)  # infinite and nan as text
    if kind in (list, tuple):
        return [_as_json(inner, depth + 1, left) for inner in value]
    if kind in (set, frozenset):
        return sorted((_as_json(inner, depth + 1, left) for inner in value), key=_order)
    if kind is dict:
        return {_key(name): _as_json(inner, depth + 1, left) for name, inner in value.items()}
    if kind in (range, complex):
        return str(value)
    return f"<{kind.__name__}>"


def _key(name: Any) -> str:
    """A dictionary's key as JSON's text: what it is, or how it would be written."""
    written = _as_json(name, 0, [MOST_ELEMENTS])
    return written if type(written) is str else json.dumps(written)


def _order(value: Any) -> tuple[str, Any]:
    number = type(value) in (int, float)
    return ("", value) if number else (type(value).__name__, json.dumps(value))
