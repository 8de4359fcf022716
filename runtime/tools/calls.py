"""The text of a tool call: how a model writes one, and how its result is written back.

    <<calc>>{"expression": "12*34"}<<result>>408

A call is a tool's name between double angle brackets and, right behind it, ONE JSON object with
the tool's arguments. The runtime inserts the result behind the closing brace: `<<result>>`, one
JSON value on one line, and a newline. Nobody else writes `<<result>>`: where a model does, that is
a fault and not a result. Inside a result `<<` is written as the JSON escape of it, so that nothing
which a tool prints can look like a call or a result.

Everything here is bounded and takes time linear in the text: this part runs in the process that
holds the model, on text that nobody has checked.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

RESULT = "<<result>>"
LONGEST_CALL = 8_192  # characters of the JSON object
DEEPEST_CALL = 4  # nested objects and lists; every schema needs less
LONGEST_RESULT = 4_000  # characters of a result's JSON; longer ones are cut by the sandbox

# JSON Schema: for prompts and for servers of tools, and what `check_arguments` goes by.
SCHEMAS: dict[str, dict[str, Any]] = {
    "calc": {
        "type": "object",
        "description": "Calculates: arithmetic, percentages, algebra.",
        "properties": {
            "expression": {"type": "string", "maxLength": 500, "description": "such as 12*(3+4)"}
        },
        "required": ["expression"],
    },
    "py": {
        "type": "object",
        "description": "Runs a small Python program; gives what it prints, or its last value.",
        "properties": {"code": {"type": "string", "maxLength": 4_000, "description": "a program"}},
        "required": ["code"],
    },
    "bash": {
        "type": "object",
        "description": "Runs text commands joined by |, in an empty folder of its own.",
        "properties": {
            "command": {"type": "string", "maxLength": 1_000, "description": "such as seq 3 | tac"},
            "files": {
                "type": "object",
                "description": "files to put there first: name -> text",
                "additionalProperties": {"type": "string"},
                "maxProperties": 8,
            },
        },
        "required": ["command"],
    },
}
_TYPES = {"string": (str, "a string"), "object": (dict, "an object")}
_OPENING = re.compile(r"<<([A-Za-z_][A-Za-z0-9_]{0,31})>>")
_STRUCTURE = re.compile(r'[{}\[\]"]')
_END_OF_STRING = re.compile(r'(?:[^"\\]|\\.)*+"', re.DOTALL)


@dataclass(frozen=True)
class Call:
    """A complete, well-formed call: `text` is exactly what the model wrote, brackets to brace."""

    name: str
    arguments: dict[str, Any]
    text: str


@dataclass(frozen=True)
class BadCall:
    """A call that cannot be run: what was written, and what is wrong, for the model to read."""

    text: str
    error: str


@dataclass(frozen=True)
class ToolResult:
    """What came of a call. `value` is JSON; `error` is None exactly when `ok`.

    seconds: wall time of the tool. truncated: the output was longer than the limit, and was cut.
    """

    ok: bool
    value: Any
    error: str | None
    seconds: float
    truncated: bool = False


def find_call(text: str) -> Call | BadCall | None:
    """The first call in a text that is complete, or None while there is none yet.

    text: what the model has written since the last inserted result. A call that can no longer
    become a good one is a BadCall as soon as that is sure; its text ends where that was seen.
    """
    opening = _OPENING.search(text)
    if opening is None:
        return None
    name, start = opening.group(1), opening.end()
    if opening.group() == RESULT:
        return BadCall(RESULT, f"only the runtime writes {RESULT}; end the call and wait")
    if name not in SCHEMAS:
        return BadCall(opening.group(), f"there is no tool {name!r}; there are {_listed(SCHEMAS)}")
    if start == len(text):
        return None
    if text[start] != "{":
        error = f"right behind {opening.group()} comes one JSON object, not {text[start]!r}"
        return BadCall(text[opening.start() : start + 1], error)
    end = _end_of_object(text, start)
    written = text[opening.start() : end if end is not None else start + LONGEST_CALL]
    if isinstance(end, int) and end - start <= LONGEST_CALL:
        return _read(name, text[start:end], written)
    if end is None and len(text) - start <= LONGEST_CALL:
        return None
    return BadCall(written, f"the call is longer than {LONGEST_CALL} characters; write less")


def write_call(name: str, arguments: Mapping[str, Any]) -> str:
    """The text of a call. Raises ValueError for one that `find_call` would refuse."""
    text = f"<<{name}>>{json.dumps(dict(arguments), ensure_ascii=False)}"
    found = find_call(text)
    if not isinstance(found, Call):
        raise ValueError(f"not a call: {text!r}: {found.error if found else 'incomplete'}")
    return text


def write_result(result: ToolResult) -> str:
    """What the runtime inserts behind a call: the marker, one JSON value, a newline."""
    value = result.value if result.ok else {"error": result.error}
    return RESULT + json.dumps(value, ensure_ascii=False).replace("<<", "\\u003c\\u003c") + "\n"


def _end_of_object(text: str, start: int) -> int | None:
    """Where the JSON object that opens at `start` closes (behind its brace); None: not yet.

    One that runs past LONGEST_CALL or DEEPEST_CALL ends there.
    """
    depth, at, stop = 0, start, min(len(text), start + LONGEST_CALL)
    while match := _STRUCTURE.search(text, at, stop):
        at = match.end()
        if match.group() == '"':
            string = _END_OF_STRING.match(text, at, stop)
            if string is None:
                return None
            at = string.end()
        else:
            depth += 1 if match.group() in "{[" else -1
            if depth == 0 or depth > DEEPEST_CALL:
                return at
    return None


def _read(name: str, written: str, text: str) -> Call | BadCall:
    """A call from its JSON, if it is JSON and fits the tool's schema."""
    if _too_deep(written):
        return BadCall(text, f"the arguments are nested deeper than {DEEPEST_CALL}")
    try:
        arguments = _DECODER.decode(written)
    except json.JSONDecodeError as error:
        return BadCall(text, f"not JSON at character {error.pos + 1}: {error.msg}")
    except ValueError as error:  # a name twice, NaN, an integer of thousands of digits
        return BadCall(text, f"not the JSON of a call: {error}")
    wrong = check_arguments(name, arguments)
    return BadCall(text, wrong) if wrong else Call(name, arguments, text)


def _too_deep(written: str) -> bool:
    """Whether `_end_of_object` stopped for depth: then the object is not closed."""
    outside = re.sub(r'"(?:[^"\\]|\\.)*+"', "", written, flags=re.DOTALL)
    opened = outside.count("{") + outside.count("[")
    return opened - outside.count("}") - outside.count("]") > DEEPEST_CALL


def check_arguments(name: str, arguments: Mapping[str, Any]) -> str | None:
    """What is wrong with a tool's arguments, in words that a model can act on; None: nothing."""
    schema = SCHEMAS[name]
    known = schema["properties"]
    for missing in (key for key in schema["required"] if key not in arguments):
        return f"{name} needs {missing!r}, {_TYPES[known[missing]['type']][1]}"
    for key, value in arguments.items():
        if key not in known:
            return f"{name} has no {key!r}; it takes {_listed(known)}"
        wrong = _wrong_value(value, known[key])
        if wrong:
            return f"{name}: {key!r} {wrong}"
    return None


def _wrong_value(value: Any, schema: Mapping[str, Any]) -> str | None:
    kind, words = _TYPES[schema["type"]]
    if not isinstance(value, kind):
        return f"must be {words}, not {json.dumps(value)[:40]}"
    if "maxLength" in schema and len(value) > schema["maxLength"]:
        return f"has {len(value)} characters; at most {schema['maxLength']}"
    if kind is str:
        return None if _writable(value) else "holds a lone surrogate, which is no text"
    if len(value) > schema["maxProperties"]:
        return f"has {len(value)} entries; at most {schema['maxProperties']}"
    wrong = (_wrong_value(inner, schema["additionalProperties"]) for inner in value.values())
    return next(filter(None, wrong), None)


def _writable(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _listed(names: Mapping[str, Any]) -> str:
    return ", ".join(sorted(names))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"{max(names, key=names.count)!r} stands there twice")
    return dict(pairs)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_constant)
