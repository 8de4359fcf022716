"""Skills from the standard library: whole modules are held out, and code is what stands there."""

import ast
from collections import Counter
from pathlib import Path

import pytest

from stages.formats.conversations import Conversation
from stages.prepare.python_skills import MOST_OF_A_MODULE, python_code, python_questions
from stages.prepare.skills import clean_conversations
from stages.prepare.splits import Wanted
from stages.prepare.standard_library import documented, in_module
from stages.prepare.wordings import read_wordings

SOURCES = {"python-code": python_code, "python-questions": python_questions}
ALL = Wanted(train=9999, heldout=9999, seed=0)

both = pytest.mark.parametrize("name", SOURCES)

Split = tuple[list[Conversation], list[Conversation]]


@pytest.fixture(scope="module")
def made() -> dict[str, Split]:
    return {name: source(ALL, ()) for name, source in SOURCES.items()}


def tops(conversations: list[Conversation]) -> Counter[str]:
    return Counter(told.facts["module"].partition(".")[0] for told in conversations)


# --- both data sets --------------------------------------------------------------------------


@both
def test_there_is_enough_of_many_modules(name: str, made: dict[str, Split]) -> None:
    train, heldout = made[name]
    assert len(train) >= 500 and len(heldout) >= 40
    assert len(tops(train)) >= 50 and len(tops(heldout)) >= 5
    assert max(tops(heldout).values()) <= MOST_OF_A_MODULE
    assert len({told.id for told in train + heldout}) == len(train) + len(heldout)


def test_a_module_is_on_one_side_in_both_data_sets(made: dict[str, Split]) -> None:
    train, heldout = ([*made["python-code"][i], *made["python-questions"][i]] for i in (0, 1))
    assert tops(train).keys().isdisjoint(tops(heldout).keys())


@both
def test_no_answer_and_no_request_is_on_both_sides(name: str, made: dict[str, Split]) -> None:
    train, heldout = made[name]
    assert {told.reply for told in train}.isdisjoint(told.reply for told in heldout)
    assert {told.prompt for told in train}.isdisjoint(told.prompt for told in heldout)
    assert len({told.reply for told in train}) == len(train), "twins such as ntpath's"


@both
def test_cleaning_leaves_nearly_all(name: str, made: dict[str, Split]) -> None:
    train, heldout = made[name]
    kept, dropped = clean_conversations(name, train, heldout, [])
    assert dropped <= 0.02 * len(train) and len(kept) == len(train) - dropped


@both
def test_held_out_requests_are_also_asked_in_words_that_never_trained(
    name: str, made: dict[str, Split]
) -> None:
    train, heldout = made[name]
    assert not any(told.facts["new_wording"] for told in train)
    share = sum(told.facts["new_wording"] for told in heldout) / len(heldout)
    assert 1 / 4 < share < 3 / 4
    wordings = read_wordings(name)
    assert 3 * len(wordings.heldout) >= len(wordings.heldout) + len(wordings.training)


@both
def test_the_same_seed_gives_the_same_and_another_one_other_splits(
    name: str, made: dict[str, Split]
) -> None:
    again = SOURCES[name](ALL, ())
    assert again == made[name]
    few = SOURCES[name](Wanted(train=7, heldout=3, seed=0), ())
    assert few == (made[name][0][:7], made[name][1][:3])
    other = SOURCES[name](Wanted(train=9999, heldout=9999, seed=1), ())
    assert tops(other[1]).keys() != tops(made[name][1]).keys()


# --- what is asked and answered --------------------------------------------------------------


def test_code_is_a_function_that_parses_without_its_docstring(made: dict[str, Split]) -> None:
    for told in [*made["python-code"][0], *made["python-code"][1]]:
        code = told.reply.removeprefix("```python\n").removesuffix("\n```")
        (function,) = ast.parse(code).body
        assert isinstance(function, ast.FunctionDef) and ast.get_docstring(function) is None
        assert told.id.endswith(f".{function.name}") and not function.name.startswith("_")
        assert f"{function.name}({ast.unparse(function.args)})" in told.prompt


def test_questions_name_what_they_ask_about_and_answers_are_sentences(
    made: dict[str, Split],
) -> None:
    for told in [*made["python-questions"][0], *made["python-questions"][1]]:
        module = told.facts["module"]
        short = told.id.removeprefix(f"{module}.")
        assert told.id in told.prompt or (f"`{short}`" in told.prompt and module in told.prompt)
        assert told.reply[-1] in ".!?" and "\n" not in told.reply and ">>>" not in told.reply


def test_what_everybody_knows_is_there() -> None:
    found = {item.full_name: item for item in documented()}
    assert "Find the n largest elements" in found["heapq.nlargest"].paragraph
    assert found["textwrap.dedent"].summary.startswith("Remove any common leading whitespace")
    assert found["collections.Counter"].code is None
    assert not any("._" in name for name in found)


# --- reading a file --------------------------------------------------------------------------

MODULE = '''
import functools

@functools.cache
def twice(number: int, *, by=2):
    """Return `number` as often
    as is asked for

    More about it.
    """

    # by is 2
    return number * by

def idle():
    """Do nothing at all, for now."""
    raise NotImplementedError

def oneliner(): """Say nothing but this."""; return 1

def signature(a):
    """signature(a) gives that of a."""
    return a

def example():
    """Show it by this:

    >>> example()
    """
    return 1

def _hidden():
    """Nobody is to call this."""
    return 1

def bare():
    return 1

class Thing:
    """Hold one thing, ``whatever`` it is."""
'''


def test_a_file_gives_what_is_public_documented_and_prose(tmp_path: Path) -> None:
    path = tmp_path / "some.py"
    path.write_text(MODULE, encoding="utf-8")
    found = {item.name: item for item in in_module(path, "some")}
    assert list(found) == ["twice", "idle", "oneliner", "Thing"]
    twice = found["twice"]
    assert twice.paragraph == "Return `number` as often as is asked for."
    assert twice.signature == "twice(number: int, *, by=2)"
    assert twice.code == (
        "@functools.cache\ndef twice(number: int, *, by=2):\n    # by is 2\n    return number * by"
    )
    assert found["idle"].code is None and found["oneliner"].code is None
    assert found["Thing"].paragraph == "Hold one thing, `whatever` it is."


def test_a_file_that_is_not_python_gives_nothing(tmp_path: Path) -> None:
    path = tmp_path / "some.py"
    path.write_text("def broken(:\n", encoding="utf-8")
    assert list(in_module(path, "some")) == []
