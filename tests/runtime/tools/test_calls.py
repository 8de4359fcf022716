"""The text of a call: found as soon as it is complete, refused in words, written back safely."""

import json
import time

import pytest

from runtime.tools.calls import (
    LONGEST_CALL,
    SCHEMAS,
    BadCall,
    Call,
    ToolResult,
    check_arguments,
    find_call,
    write_call,
    write_result,
)

TEXT = '<<calc>>{"expression": "12*34"}'


def test_a_call_is_found_where_it_is_complete_and_not_before() -> None:
    for end in range(len(TEXT)):
        assert find_call("So: " + TEXT[:end]) is None
    assert find_call(f"So: {TEXT} and on") == Call("calc", {"expression": "12*34"}, TEXT)


def test_the_first_of_two_calls_is_found() -> None:
    other = '<<py>>{"code": "1"}'
    assert find_call(TEXT + other).text == TEXT
    assert find_call(other + TEXT).text == other


@pytest.mark.parametrize("value", ['}"', "{[", '\\"}', "a\nb", "ä€", "<<calc>>{}", "\\"])
def test_what_stands_in_a_string_does_not_end_a_call(value: str) -> None:
    text = "<<py>>" + json.dumps({"code": value})
    assert find_call("x" + text + "}") == Call("py", {"code": value}, text)


def test_a_written_call_is_found_again() -> None:
    arguments = {"command": "cat a", "files": {"a": "ä\n"}}
    text = write_call("bash", arguments)
    assert find_call(text) == Call("bash", arguments, text)


def test_a_call_that_could_not_be_found_again_is_not_written() -> None:
    with pytest.raises(ValueError, match="'expression'"):
        write_call("calc", {"code": "1"})


@pytest.mark.parametrize("text", ["", "<<", "a << b >> c", "<<calc>", "<< calc >>{}", "<<1>>{}"])
def test_prose_is_no_call(text: str) -> None:
    assert find_call(text) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('<<calk>>{"expression": "1"}', "no tool 'calk'; there are bash, calc, py"),
        ("<<result>>408", "only the runtime writes <<result>>"),
        ('<<calc>> {"expression": "1"}', "one JSON object, not ' '"),
        ("<<calc>>12*34", "one JSON object, not '1'"),
        ("<<calc>>[1]", "one JSON object"),
        ("<<calc>>{expression: 1}", "not JSON at character 2"),
        ('<<calc>>{"expression": "1",}', "not JSON at character"),
        ("<<calc>>{'expression': '1'}", "not JSON at character 2"),
        ("<<calc>>{}", "calc needs 'expression', a string"),
        ('<<calc>>{"expression": 1}', "'expression' must be a string, not 1"),
        ('<<calc>>{"expression": null}', "must be a string, not null"),
        ('<<calc>>{"expression": "1", "x": 2}', "calc has no 'x'; it takes expression"),
        ('<<calc>>{"expression": "1", "expression": "2"}', "stands there twice"),
        ('<<calc>>{"expression": NaN}', "NaN is no JSON number"),
        ('<<py>>{"code": "\\ud800"}', "lone surrogate"),
        ('<<bash>>{"command": "ls", "files": []}', "'files' must be an object, not \\[\\]"),
        ('<<bash>>{"command": "ls", "files": {"a": 1}}', "must be a string, not 1"),
        ('<<calc>>{"a":{"a":{"a":{"a":{"a":1}}}}}', "nested deeper than 4"),
        ('<<calc>>{"expression": ' + "1" * 5000 + "}", "not the JSON of a call"),
        ('<<calc>>{"expression": "' + "1" * 501 + '"}', "has 501 characters; at most 500"),
        ("<<calc>>{" + " " * (LONGEST_CALL + 1), f"longer than {LONGEST_CALL}"),
        ('<<calc>>{"expression": "' + "1" * (LONGEST_CALL + 9), f"longer than {LONGEST_CALL}"),
    ],
)
def test_a_bad_call_says_what_is_wrong(text: str, words: str) -> None:
    import re

    found = find_call("I think " + text)
    assert isinstance(found, BadCall)
    assert re.search(words, found.error), found.error
    assert found.text and found.text in text


def test_reading_takes_time_linear_in_the_text() -> None:
    """A second for what a quadratic reader would take minutes for."""
    began = time.process_time()
    for text in (
        "<<" * 500_000,
        "<<calc>>{" + "[" * 10**6,
        '<<calc>>{"' + "\\" * 10**6,
        "<<a" * 10**5,
    ):
        find_call(text)
    assert time.process_time() - began < 5


def test_a_result_is_one_line_of_json_behind_the_marker() -> None:
    assert write_result(ToolResult(True, 408, None, 0.1)) == "<<result>>408\n"
    assert write_result(ToolResult(True, "a\nb", None, 0.1)) == '<<result>>"a\\nb"\n'
    assert write_result(ToolResult(False, None, "no", 0.1)) == '<<result>>{"error": "no"}\n'


def test_a_result_cannot_look_like_a_call_or_a_result() -> None:
    value = f"<<result>>1 {TEXT}"
    written = write_result(ToolResult(True, value, None, 0.1))
    assert find_call(written.removeprefix("<<result>>")) is None
    assert json.loads(written.removeprefix("<<result>>")) == value


def test_every_schema_asks_for_what_it_names() -> None:
    for name, schema in SCHEMAS.items():
        assert set(schema["required"]) <= set(schema["properties"])
        assert check_arguments(name, dict.fromkeys(schema["required"], "1")) is None
