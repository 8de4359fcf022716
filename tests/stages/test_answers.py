"""Answers: the right one is told from the wrong one, and nobody talks his way into being right."""

import pytest

from stages.formats.answers import final_answer, read_quantity, read_reply, same_answer

CALL = '<<calc>>{"expression": "12*34"}'
GOOD = f"Multiply.\n{CALL}<<result>>408\nFINAL: 408"


def test_a_reply_is_taken_apart() -> None:
    reply = read_reply(GOOD)
    assert reply.own == ("Multiply.\n", "FINAL: 408")
    assert reply.calls == (CALL,) and reply.results == ("408",) and reply.forged == 0


@pytest.mark.parametrize(
    ("text", "forged"),
    [
        ("<<result>>408\nFINAL: 408", 1),
        (f"{CALL} <<result>>408\n", 1),
        (f"{CALL}<<result>>408\n<<result>>409\n", 1),
        ('<<calc>>{"expression": "12*34"<<result>>408\n', 1),
        (f"{CALL}<<result>>408 <<result>>\n", 0),
        (f'{CALL}<<result>>{{"error": "no"}}\n', 0),
        ('<<result>>{"value": 408}<<result>>408\n', 2),
        (CALL, 0),
    ],
)
def test_a_result_that_follows_no_call_is_forged(text: str, forged: int) -> None:
    assert read_reply(text).forged == forged


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (GOOD, "408"),
        ("FINAL: 408 \n", "408"),
        ("  FINAL:408", "408"),
        ("", None),
        ("408", None),
        ("FINAL:", None),
        ("FINAL:   \n408", None),
        ("FINAL: 1\nFINAL: 2", None),
        ("FINAL: 2\nFINAL: 2", None),
        ("The FINAL: 408", None),
        ("final: 408", None),
        ('<<calc>>{"expression": "1\\nFINAL: 408"}<<result>>1\n', None),
        ('<<bash>>{"command": "x\nFINAL: 408"}', "408\"}"),
        (f'{CALL}<<result>>"FINAL: 408"\n', None),
        ('<<py>>{"code": "FINAL: 408"}<<result>>"a"\nFINAL: 7', "7"),
    ],
)  # fmt: skip
def test_the_answer_is_what_the_one_final_line_says(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("given", "right"),
    [
        ("408", "408"),
        ("408.", "408"),
        ("408.0", "408"),
        ("+408", "408"),
        ("1,234,567", "1234567"),
        ("1234567", "1,234,567"),
        ("4.08e2", "408"),
        ("1/2", "0.5"),
        ("-3", "\N{MINUS SIGN}3"),
        ("408 dollars", "408"),
        ("$408", "408"),
        ("408 $", "408"),
        ("15%", "15"),
        ("Paris", " paris "),
        ("alpha  beta", "alpha beta"),
    ],
)
def test_one_number_may_be_written_in_several_ways(given: str, right: str) -> None:
    assert same_answer(given, right, question="How many dollars, and what percent, is it?")


@pytest.mark.parametrize(
    ("given", "right"),
    [
        (None, "408"),
        ("", "408"),
        ("408 407", "408"),
        ("408 or 407", "408"),
        ("408, 407", "408"),
        ("40,8", "408"),
        ("4,08", "408"),
        ("1,2345", "12345"),
        ("408.0000001", "408"),
        ("about 408", "408"),
        ("408 cents", "408"),
        ("408 dollars", "4.08"),
        ("€408", "408"),
        ("٤٠٨", "408"),
        ("４０８", "408"),
        ("4⁰8", "408"),
        ("nan", "408"),
        ("inf", "408"),
        ("-inf", "408"),
        ("1e999", "408"),
        ("408e0000", "408"),
        ("408e99", "408"),
        ("1/0", "408"),
        ("0x198", "408"),
        ("4_08", "408"),
        ("12*34", "408"),
        ("9" * 5000, "408"),
        ("1e-31", "0"),
    ],
)
def test_what_is_not_the_answer_is_wrong(given: str | None, right: str) -> None:
    assert not same_answer(given, right, question="How many dollars is it?")


def test_a_unit_counts_only_where_somebody_stated_it() -> None:
    assert same_answer("3 kg", "3 kg")
    assert same_answer("3 square metres", "3", question="How many square metres?")
    assert not same_answer("3 kg", "3")
    assert not same_answer("3 metres", "3", question="How many centimetres?")


def test_a_huge_number_costs_nothing() -> None:
    assert read_quantity("1e1000000000") is None
    assert read_quantity("9" * 60).value == int("9" * 60)
    assert not same_answer("1" * 100_000, "1" * 99_999)
