"""Number masking: numbers that a model could only recite are left out of the loss.

Nano-Cog asks for "number masking for the Toolformer phase" without saying which numbers. The aim
there is that the model learns to call rather than to know results by heart (Toolformer, Schick et
al. 2023, masks nothing; it keeps calls whose result makes what follows likelier). Ours, from that:

    in sight       a number that stands in the prompt, in digits or in words ("twice" gives 2, a
                   percentage 100), in an earlier call or in an earlier result. Writing it is
                   copying, which is to be learnt: above all `FINAL: n` behind a result
    recited        any other number in own text outside calls, such as a result worked out in the
                   head before the call that computes it. The loss leaves it out
    in a call      what is to be computed is the choice to be learnt: counted always

Answers without a call keep all their numbers: there they are knowledge (a port, a file mode).
"""

import re
from dataclasses import replace
from fractions import Fraction

from stages.formats.conversations import Conversation, Segment, calls_in, joined

NUMBER = re.compile(r"(?<![\w.,])(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?", re.ASCII)
WORDS = {
    "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8,
    "nine": 9, "ten": 10, "eleven": 11, "twelve": 12, "dozen": 12, "hundred": 100,
    "half": 2, "twice": 2, "double": 2, "third": 3, "triple": 3, "quarter": 4, "percent": 100,
    "%": 100,
}  # fmt: skip
WORD = re.compile(r"[a-z]+|%")


def mask_recited(conversation: Conversation) -> Conversation:
    """The same conversation with numbers that nothing in sight gives away marked as recited."""
    segments = joined(conversation.segments)
    if not any(kind == "result" for kind, _ in segments):
        return conversation
    seen: set[Fraction] = set()
    masked: list[Segment] = []
    for kind, text in segments:
        masked += _split(text, seen) if kind == "own" else [(kind, text)]
        seen |= _in_calls(text) if kind == "own" else _in_sight(text)
    return replace(conversation, segments=tuple(masked))


def first_told(prompt: str, reply: str) -> list[int]:
    """Where in a reply without calls a number begins that nothing before it gives away: one that
    stands neither in the prompt nor earlier in the reply. In characters."""
    seen = _in_sight(prompt)
    found = []
    for match in NUMBER.finditer(reply):
        value = _value(match.group())
        if value not in seen:
            found.append(match.start())
        seen.add(value)
    return found


def _split(text: str, seen: set[Fraction]) -> list[Segment]:
    """Own text, cut where a number is recited."""
    calls = calls_in(text)
    pieces: list[Segment] = []
    at = 0
    for match in NUMBER.finditer(text):
        in_call = any(start <= match.start() < end for start, end in calls)
        if not in_call and _value(match.group()) not in seen:
            pieces += [("own", text[at : match.start()]), ("recited", match.group())]
            at = match.end()
    pieces.append(("own", text[at:]))
    return [piece for piece in pieces if piece[1]]


def _in_sight(text: str) -> set[Fraction]:
    words = {Fraction(WORDS[word]) for word in WORD.findall(text.lower()) if word in WORDS}
    return words | set(map(_value, NUMBER.findall(text)))


def _in_calls(text: str) -> set[Fraction]:
    numbers = [NUMBER.findall(text[start:end]) for start, end in calls_in(text)]
    return {_value(number) for found in numbers for number in found}


def _value(number: str) -> Fraction:
    return Fraction(number.replace(",", ""))
