"""Conversations: what `prepare` hands to the stages that teach skills.

    conversations/NAME.train.jsonl      one conversation a line
    conversations/NAME.heldout.jsonl    of templates, problems or tasks that training never shows

A conversation is a row of segments, each [kind, text]:

    prompt    what the user says; it stands first. Who trains puts the chat template around it
    own       what the model is to write. The loss counts it, and the EOS after the last one
    recited   own text that the loss leaves out: a number that nothing in sight gives away
              (`prepare.number_masking`). Tokenise it together with the own text around it
    result    what the runtime inserts behind a call: `<<result>>`, one JSON value, a newline

A call, `<<calc>>{"expression": "12*34"}`, ends the own text that it stands in, and its result
follows. A `<<result>>` in own text would teach the model to make results up: it is refused.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

KINDS = ("prompt", "own", "recited", "result")
SPLITS = ("train", "heldout")
CALL = re.compile(r"<<(?!result>>)([a-z]+)>>(?=\{)")
RESULT_MARK = "<<result>>"

Segment = tuple[str, str]  # kind, text


class BadConversation(ValueError):
    """A conversation that nothing could be learnt from as it stands."""


@dataclass(frozen=True)
class Conversation:
    """A request and the answer to learn, with what the tools give in between.

    id: unique in its file.  capability: the skill that it teaches, e.g. "arithmetic".
    segments: see the module.  answer: the right answer as text, or None where none can be checked.
    facts: what it was made from, for measuring by groups, e.g. {"operation": "*", "steps": 1}.
    Raises BadConversation, which names the conversation.
    """

    id: str
    capability: str
    segments: tuple[Segment, ...]
    answer: str | None
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            _require_order([kind for kind, _ in self.segments])
            _require_calls_and_results(joined(self.segments))
        except BadConversation as error:
            raise BadConversation(f"conversation {self.id!r}: {error}") from error
        if not self.id or not self.capability:
            raise BadConversation(f"conversation {self.id!r} needs an id and a capability")

    @property
    def prompt(self) -> str:
        """What the user says."""
        return self.segments[0][1]

    @property
    def reply(self) -> str:
        """All that stands behind the prompt, results included."""
        return "".join(text for _, text in self.segments[1:])


def joined(segments: Iterable[Segment]) -> list[Segment]:
    """The same segments with recited text put back into the own text around it."""
    merged: list[Segment] = []
    for kind, text in segments:
        kind = "own" if kind == "recited" else kind
        if merged and merged[-1][0] == kind == "own":
            text = merged.pop()[1] + text
        merged.append((kind, text))
    return merged


def calls_in(text: str) -> list[tuple[int, int]]:
    """Where the complete calls of a text stand: (first character, behind the last) each."""
    spans = []
    for match in CALL.finditer(text):
        if spans and match.start() < spans[-1][1]:
            continue  # inside a call's own arguments, e.g. in code that prints one
        try:
            _, end = json.JSONDecoder().raw_decode(text, match.end())
        except ValueError:
            continue
        spans.append((match.start(), end))
    return spans


def conversation_path(folder: Path, name: str, split: str) -> Path:
    """Where the conversations of a data set and a split lie below `artifacts/prepare`."""
    if split not in SPLITS:
        raise ValueError(f"conversations have no split '{split}'; use {' or '.join(SPLITS)}")
    return folder / "conversations" / f"{name}.{split}.jsonl"


def write_conversations(
    folder: Path, name: str, split: str, conversations: Iterable[Conversation]
) -> None:
    """Write one JSON line a conversation; the same ones give the same bytes."""
    path = conversation_path(folder, name, split)
    path.parent.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        for conversation in conversations:
            if conversation.id in seen:
                raise BadConversation(f"{path.name}: id {conversation.id!r} again; ids are unique")
            seen.add(conversation.id)
            entry = json.dumps(asdict(conversation), ensure_ascii=False, sort_keys=True)
            stream.write(entry + "\n")


def read_conversations(folder: Path, name: str, split: str) -> list[Conversation]:
    """Give the conversations that `write_conversations` wrote, in their order.

    Raises FileNotFoundError, listing what is there, and BadConversation with the line at fault.
    """
    path = conversation_path(folder, name, split)
    if not path.is_file():
        there = sorted({found.name.split(".")[0] for found in path.parent.glob("*.jsonl")})
        raise FileNotFoundError(
            f"{path} does not exist; add '{name}' to prepare.conversations and run prepare "
            f"(there are: {', '.join(there) or 'none'})"
        )
    conversations = []
    with path.open(encoding="utf-8", newline="\n") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                conversations.append(_read(line))
            except (ValueError, TypeError) as error:
                raise BadConversation(f"{path}, line {number}: {error}") from error
    return conversations


def _read(line: str) -> Conversation:
    entry = json.loads(line)
    if not isinstance(entry, dict) or "segments" not in entry:
        raise BadConversation(f"expected an object with 'segments', found {line.strip()[:80]!r}")
    segments = tuple((kind, text) for kind, text in entry["segments"])
    return Conversation(**{**entry, "segments": segments})


def _require_order(kinds: list[str]) -> None:
    """A prompt, own text, then results with own text behind each."""
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise BadConversation(f"kind {unknown[0]!r}; a segment is one of {', '.join(KINDS)}")
    if kinds[:1] != ["prompt"] or kinds.count("prompt") != 1:
        raise BadConversation(f"its segments are {', '.join(kinds)}; one prompt, and that first")
    if kinds[-1] not in ("own", "recited"):
        raise BadConversation("its last segment is no own text; the model has the last word")
    for before, kind in zip(kinds, kinds[1:], strict=False):
        if before == kind and kind != "recited":
            raise BadConversation(f"two segments of kind '{kind}' in a row; join them")


def _require_calls_and_results(segments: list[Segment]) -> None:
    """Every call has its result, and every result its call."""
    for position, (kind, text) in enumerate(segments):
        follows_result = position + 1 < len(segments) and segments[position + 1][0] == "result"
        if not text:
            raise BadConversation(f"an empty segment of kind '{kind}'; leave it out")
        if kind == "own":
            spans = calls_in(text)
            if RESULT_MARK in text:
                raise BadConversation(f"'{RESULT_MARK}' in own text; only the runtime writes one")
            if any(end != len(text) for _, end in spans):
                raise BadConversation(f"own text goes on behind a call: {text!r}; insert a result")
            if bool(spans) != follows_result:
                what = "a call without a result" if spans else "a result without a call"
                raise BadConversation(f"{what} at {text[-80:]!r}")
        if kind == "result":
            _require_result(text, segments[position - 1][0])


def _require_result(text: str, before: str) -> None:
    if before != "own":
        raise BadConversation(f"the result {text!r} stands behind a {before}; it answers a call")
    body = text.removeprefix(RESULT_MARK)
    one_line = body.endswith("\n") and "\n" not in body[:-1]
    if body == text or not one_line:
        raise BadConversation(f"a result is {RESULT_MARK}, one line of JSON and its end: {text!r}")
    try:
        json.loads(body)
    except ValueError as error:
        raise BadConversation(f"the result {text!r} is not JSON: {error}") from error
