"""Conversations: what is written is read back, the same bytes each time, and faults are named."""

from pathlib import Path

import pytest

from stages.formats.conversations import (
    BadConversation,
    Conversation,
    calls_in,
    conversation_path,
    joined,
    read_conversations,
    write_conversations,
)

CALL = '<<calc>>{"expression": "12*34"}'
GOOD = (
    ("prompt", "How many are 12 boxes of 34?"),
    ("own", f"Multiply.\n{CALL}"),
    ("result", "<<result>>408\n"),
    ("own", "FINAL: 408"),
)


def conversation(*segments: tuple[str, str], id: str = "one") -> Conversation:
    return Conversation(id, "arithmetic", segments or GOOD, "408", {"operation": "*", "steps": 1})


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    told = [
        conversation(),
        conversation(("prompt", "naïve – “quotes”\u2028"), ("own", "ok"), id="two"),
    ]
    write_conversations(tmp_path, "sums", "train", told)
    assert read_conversations(tmp_path, "sums", "train") == told
    assert told[0].prompt == GOOD[0][1]
    assert told[0].reply == f"Multiply.\n{CALL}<<result>>408\nFINAL: 408"


def test_the_same_conversations_give_the_same_bytes(tmp_path: Path) -> None:
    turned = Conversation("one", "arithmetic", GOOD, "408", {"steps": 1, "operation": "*"})
    for name, told in (("a", conversation()), ("b", turned)):
        write_conversations(tmp_path, name, "heldout", [told])
    first, second = (conversation_path(tmp_path, name, "heldout") for name in "ab")
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([("own", "Hello.")], "one prompt, and that first"),
        ([*GOOD, ("prompt", "And now?"), ("own", "ok")], "one prompt"),
        ([("prompt", "Hi"), ("said", "Hello.")], "kind 'said'"),
        ([("prompt", "Hi")], "the last word"),
        (GOOD[:3], "the last word"),
        ([("prompt", "Hi"), ("own", "a"), ("own", "b")], "in a row"),
        ([("prompt", "Hi"), ("own", "")], "empty segment"),
        ([*GOOD[:2], ("own", "x")], "in a row"),
        ([("prompt", "Hi"), ("own", f"{CALL} is it")], "goes on behind a call"),
        ([("prompt", "Hi"), ("own", f"{CALL}")], "call without a result"),
        ([("prompt", "Hi"), ("own", "No call."), *GOOD[2:]], "result without a call"),
        ([("prompt", "Hi"), *GOOD[2:]], "behind a prompt"),
        ([("prompt", "Hi"), ("own", "<<result>>4\nFINAL: 4")], "only the runtime"),
        ([*GOOD[:2], ("result", "<<result>>408"), GOOD[3]], "one line of JSON"),
        ([*GOOD[:2], ("result", "408\n"), GOOD[3]], "one line of JSON"),
        ([*GOOD[:2], ("result", "<<result>>4\n8\n"), GOOD[3]], "one line of JSON"),
        ([*GOOD[:2], ("result", "<<result>>four\n"), GOOD[3]], "not JSON"),
    ],
)  # fmt: skip
def test_what_nothing_can_be_learnt_from_is_refused(
    segments: list[tuple[str, str]], message: str
) -> None:
    with pytest.raises(BadConversation, match=message) as refusal:
        conversation(*segments, id="the-culprit")
    assert "the-culprit" in str(refusal.value)


def test_recited_text_is_own_text_that_the_loss_leaves_out() -> None:
    segments = (GOOD[0], ("own", "About "), ("recited", "400"), ("own", f". {CALL}"), *GOOD[2:])
    told = conversation(*segments)
    assert joined(told.segments)[1] == ("own", f"About 400. {CALL}")
    assert told.reply.startswith("About 400. <<calc>>")


def test_calls_are_found_whole_and_not_inside_each_other() -> None:
    inner = '<<py>>{"code": "print(\'<<calc>>{}\')"}'
    text = f"cat <<EOF and << calc >> then {CALL} and {inner} and <<calc>>{{broken"
    assert [text[start:end] for start, end in calls_in(text)] == [CALL, inner]


def test_an_id_stands_once_in_a_file(tmp_path: Path) -> None:
    with pytest.raises(BadConversation, match="'one' again"):
        write_conversations(tmp_path, "sums", "train", [conversation(), conversation()])


def test_a_missing_file_says_which_there_are(tmp_path: Path) -> None:
    write_conversations(tmp_path, "sums", "train", [conversation()])
    with pytest.raises(FileNotFoundError, match=r"prepare\.conversations.*there are: sums"):
        read_conversations(tmp_path, "differences", "train")
    with pytest.raises(ValueError, match="no split 'test'"):
        read_conversations(tmp_path, "sums", "test")


@pytest.mark.parametrize("line", ["{", '{"id": "a"}', "[]", '{"segments": 3}'])
def test_a_damaged_line_is_named_by_its_number(tmp_path: Path, line: str) -> None:
    write_conversations(tmp_path, "sums", "train", [conversation()])
    with conversation_path(tmp_path, "sums", "train").open("a", encoding="utf-8") as stream:
        stream.write(line + "\n")
    with pytest.raises(BadConversation, match="line 2"):
        read_conversations(tmp_path, "sums", "train")
