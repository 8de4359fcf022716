"""Number masking: what can be read may be learnt, what can only be recited may not."""

import pytest

from stages.formats.conversations import Conversation, joined
from stages.learning.number_masking import first_told, mask_recited

CALL = '<<calc>>{"expression": "48/2"}'


def conversation(own: str, closing: str = "FINAL: 24", result: str = "24") -> Conversation:
    segments = (
        ("prompt", "A part of 48, of 1,200 and of 3.50?"),
        ("own", own + CALL),
        ("result", f"<<result>>{result}\n"),
        ("own", closing),
    )
    return Conversation("one", "arithmetic", segments, "24")


def recited(own: str, closing: str = "FINAL: 24", result: str = "24") -> list[str]:
    told = conversation(own, closing, result)
    masked = mask_recited(told)
    assert joined(masked.segments) == joined(told.segments), "no letter is lost"
    return [text for kind, text in masked.segments if kind == "recited"]


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ("That is 24. ", ["24"]),
        ("Halve 48: 24, ", ["24"]),
        ("Of 48, 1200 and 3.5 take the first. ", []),
        ("24", ["24"]),
        ("12 + 12 = ", ["12", "12"]),
        ("About 1,000.5 of 1,200. ", ["1,000.5"]),
        ("No number. ", []),
        ("The 2nd of x24 and y3.14. ", ["2"]),
    ],
)
def test_a_number_worked_out_before_its_call_is_recited(own: str, expected: list[str]) -> None:
    assert recited(own) == expected


def test_what_a_result_or_an_earlier_call_says_is_copied() -> None:
    assert recited("Go. ", "So 24 of 48 by 2.\nFINAL: 24.0") == []
    assert recited("Go. ", "FINAL: 25") == ["25"]
    assert recited("Go. ", "FINAL: 30", result='"10 20 30"') == []


def test_a_number_in_words_is_in_sight_too() -> None:
    segments = (
        ("prompt", "Six tents, twice as many mats, 20% off?"),
        ("own", f"6 tents, times 2, of 100, and 7. {CALL}"),
        ("result", "<<result>>24\n"),
        ("own", "FINAL: 24"),
    )
    masked = mask_recited(Conversation("one", "arithmetic", segments, "24"))
    assert [text for kind, text in masked.segments if kind == "recited"] == ["7"]


def test_the_number_of_a_call_is_always_learnt() -> None:
    told = mask_recited(conversation("Halve. "))
    assert told.segments[1] == ("own", "Halve. " + CALL)


def test_answers_without_a_call_keep_their_knowledge() -> None:
    told = Conversation("one", "devops", (("prompt", "Mode?"), ("own", "chmod 644 f")), None)
    assert mask_recited(told) == told


def test_masking_twice_is_masking_once() -> None:
    once = mask_recited(conversation("That is 24, or 12 + 12. "))
    assert mask_recited(once) == once


@pytest.mark.parametrize(
    ("reply", "places"),
    [
        ("Halve 48: 24 is it. FINAL: 24", [10]),
        ("1200 and 3.5 are 1,203.5", [17]),
        ("7 and 7 and 8", [0, 12]),
        ("Nothing.", []),
    ],
)
def test_a_number_is_told_first_where_nothing_before_gives_it_away(
    reply: str, places: list[int]
) -> None:
    assert first_told("Half of 48, of 1,200 and of 3.50?", reply) == places
