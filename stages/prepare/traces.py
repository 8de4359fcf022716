"""Traces: what a model that uses tools well would have written, made from known results.

No tool runs here. A result is computed by other means, so that what is learnt is right even where
a tool is not.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stages.formats.conversations import RESULT_MARK, Segment, calls_in


@dataclass(frozen=True)
class Step:
    """A call and what leads to it.

    said: own text before the call.  tool: its name.  arguments: of the call.  result: JSON value.
    """

    said: str
    tool: str
    arguments: dict[str, Any]
    result: Any


def trace(prompt: str, steps: Sequence[Step], closing: str) -> tuple[Segment, ...]:
    """The segments of a prompt, calls with their results, and the own text that closes."""
    segments: list[Segment] = [("prompt", prompt)]
    for step in steps:
        call = f"<<{step.tool}>>{json.dumps(step.arguments, ensure_ascii=False)}"
        segments.append(("own", step.said + call))
        value = json.dumps(step.result, ensure_ascii=False)
        segments.append(("result", f"{RESULT_MARK}{value}\n"))
    return (*segments, ("own", closing))


def in_the_head(segments: Sequence[Segment], line: str) -> tuple[Segment, ...]:
    """The same answer without calls: where one stood, a line states what it gave.

    line: with a place for the value, such as "That makes {}.".
    """
    told = ""
    for kind, text in segments[1:]:
        if kind == "result":
            told += line.format(text.removeprefix(RESULT_MARK).rstrip("\n")) + "\n"
        else:
            start, _ = next(iter(calls_in(text)), (len(text), 0))
            told += text[:start]
    return segments[0], ("own", told)


def final(answer: object) -> str:
    """The line that ends an answer."""
    return f"FINAL: {answer}"
