"""Answers: what a model's reply says in the end, and whether that is right.

A reply ends with one line `FINAL: <answer>`. Calls and results are not part of what the model
says: a FINAL inside a call's arguments or a tool's result is none.

    parts of a reply    own text | call | result | own text | ...

A result is the runtime's when it is one line right behind a complete call: the engine stops there,
so that a model never gets to write that place itself. Any other `<<result>>` is forged. Where
something else than the engine samples, and does not stop at calls, text alone cannot tell.
Numbers are compared as exact fractions.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from stages.formats.conversations import RESULT_MARK, calls_in

FINAL = re.compile(r"^[ \t]*FINAL:(.*)$", re.MULTILINE)
LONGEST_ANSWER = 200  # characters; what is longer is compared as text
LARGEST_EXPONENT = 30

_NUMBER = re.compile(
    r"(?P<sign>[-+]?)(?P<before>[$€£]?)(?P<whole>\d{1,3}(?:,\d{3})+|\d{1,60})"
    r"(?:\.(?P<places>\d{1,60}))?(?:[eE](?P<exponent>[-+]?\d{1,3}))?(?:/(?P<below>\d{1,60}))?"
    r"[ ]?(?P<unit>[A-Za-z%$€£²³/ ]{0,60}?)\.?",
    re.ASCII,
)
_SIGNS = {
    "$": ("dollar", "dollars"),
    "€": ("euro", "euros"),
    "£": ("pound", "pounds"),
    "%": ("percent", "per cent"),
}


@dataclass(frozen=True)
class Reply:
    """A reply taken apart. own: its own text without calls and results, piece by piece.

    calls: the texts of complete calls.  results: those that the runtime inserted, without marker.
    forged: how many `<<result>>` the model wrote itself.
    """

    own: tuple[str, ...]
    calls: tuple[str, ...]
    results: tuple[str, ...]
    forged: int

    @property
    def said(self) -> str:
        """All own text; a newline stands where a call stood."""
        return "\n".join(self.own)


@dataclass(frozen=True)
class Quantity:
    """A number and the words behind it, such as 408 and "dollars"."""

    value: Fraction
    unit: str


def read_reply(text: str) -> Reply:
    """Take a reply apart into own text, calls and results."""
    own, calls, results = [], [], []
    at = 0
    for start, end in calls_in(text):
        if start < at:
            continue  # inside a result: what a tool prints is no call
        own.append(text[at:start])
        calls.append(text[start:end])
        at = end
        if text.startswith(RESULT_MARK, end):
            line_end = text.find("\n", end)
            at = len(text) if line_end < 0 else line_end + 1
            results.append(text[end + len(RESULT_MARK) : at].rstrip("\n"))
    own.append(text[at:])
    return Reply(tuple(own), tuple(calls), tuple(results), sum(map(_marks_in, own)))


def final_answer(text: str) -> str | None:
    """The answer behind the one FINAL of a reply; None where there is none, or more than one."""
    found = FINAL.findall(read_reply(text).said)
    return found[0].strip() or None if len(found) == 1 else None


def same_answer(given: str | None, right: str, question: str = "") -> bool:
    """Whether an answer is the right one.

    Numbers are equal as exact fractions; separators of thousands and a full stop at the end do not
    matter. A unit may stand there if the question or the right answer states it. Where either is
    no number, the texts must be the same but for case and spaces.
    """
    if given is None:
        return False
    first, second = read_quantity(given), read_quantity(right)
    if first is None or second is None:
        return _plain(given) == _plain(right)
    return first.value == second.value and _stated(first.unit, f"{question} {second.unit}")


def read_quantity(text: str) -> Quantity | None:
    """The number that a text consists of, with its unit; None for anything else.

    ASCII digits alone are numbers; infinities, NaN and exponents beyond 30 are not.
    """
    text = text.strip().replace("\N{MINUS SIGN}", "-")
    match = _NUMBER.fullmatch(text) if len(text) <= LONGEST_ANSWER else None
    if match is None:
        return None
    exponent = int(match["exponent"] or 0)
    below = int(match["below"] or 1)
    if abs(exponent) > LARGEST_EXPONENT or below == 0:
        return None
    whole = match["whole"].replace(",", "")
    value = Fraction(f"{match['sign']}{whole}.{match['places'] or 0}") * Fraction(10) ** exponent
    unit = f"{match['before']} {match['unit']}".strip()
    return Quantity(value / below, unit)


def _marks_in(text: str) -> int:
    return text.count(RESULT_MARK)


def _stated(unit: str, where: str) -> bool:
    """Whether every word of a unit stands in a text; a sign and its word count as one."""
    where = where.lower()
    words = set(re.findall(r"[a-z²³]+|[%$€£]", where))
    for sign, names in _SIGNS.items():
        if sign in words or any(name in where for name in names):
            words |= {sign, *" ".join(names).split()}
    return set(re.findall(r"[a-z²³]+|[%$€£]", unit.lower())) <= words


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
