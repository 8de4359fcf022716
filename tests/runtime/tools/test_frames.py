"""What a worker may send: messages of bounded size, with the nonce of the call it was given."""

import json

import pytest

from runtime.tools.frames import NO_NONCE, BadFrame, Inbox, pack
from runtime.tools.server import fits

NONCE = bytes(range(16))


def test_messages_come_out_as_they_went_in_however_they_are_cut() -> None:
    sent = pack({"a": "ä"}, NONCE) + pack([1, None])
    inbox, taken = Inbox(), []
    for byte in sent:
        inbox.add(bytes([byte]))
        while (message := inbox.take()) is not None:
            taken.append(message)
    assert taken == [({"a": "ä"}, NONCE), ([1, None], NO_NONCE)]
    assert inbox.empty


@pytest.mark.parametrize("body", [b"{", b"\xff", b"NaN", b"[" * 200_000, b""])
def test_what_is_no_json_is_no_message(body: bytes) -> None:
    inbox = Inbox()
    inbox.add(len(body).to_bytes(4, "big") + NO_NONCE + body)
    with pytest.raises(BadFrame):
        inbox.take()


def test_a_message_that_is_too_long_is_refused_by_its_head() -> None:
    inbox = Inbox(longest=10)
    inbox.add(pack("x" * 20)[:20])
    with pytest.raises(BadFrame, match="22 bytes; at most 10"):
        inbox.take()


@pytest.mark.parametrize(
    "answer",
    [
        None,
        {},
        {"value": 1, "error": None},
        {"value": 1, "error": None, "truncated": False, "more": 1},
        {"value": 1, "error": 1, "truncated": False},
        {"value": 1, "error": None, "truncated": 0},
        {"value": "x" * 99, "error": None, "truncated": False},
        {"value": None, "error": "x" * 9_999, "truncated": False},
    ],
)
def test_an_answer_has_its_shape_and_its_size(answer: object) -> None:
    good = {"value": "x" * 98, "error": None, "truncated": True}
    assert fits(json.loads(json.dumps(good)), 100)
    assert not fits(answer, 100)
