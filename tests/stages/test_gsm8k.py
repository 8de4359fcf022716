"""GSM8K: an annotation becomes a call, or the problem is left out."""

from fractions import Fraction

import pytest

from stages.formats.conversations import BadConversation
from stages.prepare.gsm8k import conversation_of, exact_value

SOLUTION = "She sold 48/2 = <<48/2=24>>24 in May.\nIn all $<<48+24=72>>72.\n#### 72"


def test_annotations_become_calls_and_the_marked_answer_becomes_final() -> None:
    told = conversation_of("How many?", SOLUTION)
    assert told.segments == (
        ("prompt", "How many?"),
        ("own", 'She sold 48/2 = <<calc>>{"expression": "48/2"}'),
        ("result", "<<result>>24\n"),
        ("own", '24 in May.\nIn all $<<calc>>{"expression": "48+24"}'),
        ("result", "<<result>>72\n"),
        ("own", "72.\nFINAL: 72"),
    )
    assert told.answer == "72" and told.facts == {"operation": "several", "steps": 2}


def test_fractions_are_written_as_the_calculator_does() -> None:
    told = conversation_of("Pay?", "So <<12/60=0.2>>0.2, <<.2*50=10.0>>10.\n#### 1,010")
    results = [text for kind, text in told.segments if kind == "result"]
    assert results == ["<<result>>0.2\n", "<<result>>10\n"]
    assert told.answer == "1010"


def test_an_annotation_that_computes_nothing_is_no_call() -> None:
    told = conversation_of("How many?", "Let it be <<5=5>>5, so <<5+1=6>>6.\n#### 6")
    assert told.facts["steps"] == 1 and told.segments[1][1].startswith("Let it be 5, so <<calc>>")
    assert conversation_of("How many?", "It is <<5=5>>5.\n#### 5") is None


@pytest.mark.parametrize(
    "body",
    [
        "A third is <<1/3=0.33>>0.33.",
        "Wrong: <<2+2=5>>5.",
        "Nothing to calculate.",
        "Broken: <<2+=4>>4.",
        "Not numbers: <<x*2=4>>4.",
        "By nothing: <<4/0=4>>4.",
        "A power: <<2**3=8>>8.",
    ],
)
def test_what_cannot_be_relied_upon_is_left_out(body: str) -> None:
    assert conversation_of("How many?", f"{body}\n#### 4") is None


def test_a_row_of_another_kind_is_refused() -> None:
    with pytest.raises(BadConversation, match="#### answer"):
        conversation_of("How many?", "Four.")


@pytest.mark.parametrize(
    ("text", "value"),
    [("0.1+0.2", Fraction(3, 10)), ("-(2-5)*1.5", Fraction(9, 2)), ("f(2)", None), ("", None)],
)
def test_values_are_exact(text: str, value: Fraction | None) -> None:
    assert exact_value(text) == value
