"""Where prepare's documents come from: made problems that are right, and sources that stay."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from registry.catalog import lookup
from registry.records import Dataset, Source
from registry.strict import BadEntry
from stages.params import read_section
from stages.prepare import arithmetic
from stages.prepare.clean import Document, drop_contaminated
from stages.prepare.collect import collect
from stages.prepare.sources import PYTHON_SOURCES, read_documents
from stages.prepare.stage import Params
from stages.process import Stopped, StopRequest
from tests.stages.project import make_project
from tests.tiny import REPOSITORY

# --- arithmetic ------------------------------------------------------------------------------

SUM = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)\.")
RESULT = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
}
KINDS = {"training": arithmetic.training_problems, "heldout": arithmetic.heldout_problems}


@pytest.mark.parametrize("kind", KINDS)
def test_every_worked_answer_is_right(kind: str) -> None:
    operations = Counter()
    for _, text in KINDS[kind](seed=3):
        ((a, operation, b, result),) = SUM.findall(text)
        assert RESULT[operation](int(a), int(b)) == int(result), text
        assert text.endswith(f"The answer is {result}.")
        question = text.partition("\nAnswer: ")[0]
        asked = re.findall(r"\d+", question)
        assert sorted(asked) == sorted([a, b]), text
        operations[operation] += 1
    assert set(operations) == set(RESULT)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_unfilled(kind: str) -> None:
    assert not any(re.search(r"[{}]|None", text) for _, text in KINDS[kind](seed=0))


def test_heldout_templates_never_occur_in_training() -> None:
    def shape(text: str) -> str:
        fillings = "|".join([*arithmetic.NAMES, *arithmetic.THINGS, r"\d+"])
        return re.sub(rf"\b({fillings})\b", "_", text)

    training = {shape(text) for _, text in arithmetic.training_problems(0)}
    heldout = {shape(text) for _, text in arithmetic.heldout_problems(0)}
    assert len(training) == 10 and len(heldout) == 4
    for parts in (lambda text: text, lambda text: text.partition("Answer: ")[0]):
        assert {parts(text) for text in training}.isdisjoint(parts(text) for text in heldout)


def test_decontamination_against_heldout_problems_costs_no_training_problem() -> None:
    training = [Document("train", *pair) for pair in arithmetic.training_problems(0)]
    heldout = [Document("heldout", *pair) for pair in arithmetic.heldout_problems(0)]
    kept, _ = drop_contaminated(training, heldout)
    assert len(kept) == len(training)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_problems(kind: str) -> None:
    first, again, other = (list(KINDS[kind](seed)) for seed in (5, 5, 6))
    assert first == again
    assert first != other
    assert len({name for name, _ in first}) == len(first) == arithmetic.PROBLEMS


# --- sources ---------------------------------------------------------------------------------


def test_every_python_source_of_the_registry_is_there() -> None:
    from registry.catalog import names

    entries = [lookup(kind, name) for kind in ("datasets", "benchmarks") for name in names(kind)]
    wanted = {entry.source.python for entry in entries if entry.source.python}
    assert wanted == set(PYTHON_SOURCES)


@pytest.mark.parametrize(("limit", "expected"), [(5, 5), (0, arithmetic.PROBLEMS)])
def test_a_limit_of_zero_takes_all(limit: int, expected: int) -> None:
    assert len(read_documents(lookup("datasets", "arithmetic"), limit, seed=0)) == expected


def test_the_offline_documentation_is_the_same_each_time_and_worth_reading() -> None:
    first, again = (read_documents(lookup("datasets", "python-docs"), 60, 0) for _ in range(2))
    assert first == again
    assert len({name for name, _ in first}) == 60
    assert all(text.strip() for _, text in first)


def test_an_unknown_dataset_is_refused_naming_near_ones(tmp_path: Path) -> None:
    text = (REPOSITORY / "params.yaml").read_text(encoding="utf-8")
    path = tmp_path / "params.yaml"
    path.write_text(text.replace("datasets: [python-docs", "datasets: [pyhton-docs"))
    with pytest.raises(BadEntry, match="'prepare'.*'pyhton-docs'.*Did you mean python-docs"):
        read_section(path, "prepare", Params)


def hub_dataset(folder: Path, rows: list[dict[str, str]], text: str) -> Dataset:
    """A data set in a folder, which `datasets` opens as it opens one of the hub."""
    folder.mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "train.jsonl").write_text(lines, encoding="utf-8")
    source = Source(hub=str(folder), split="train")
    return Dataset("trivia", source, text, "MIT", "text", (), False, "Questions.")


ROWS = [{"q": "2 + 2?", "a": "4"}, {"q": " ", "a": ""}, {"q": "Up?", "a": "Down."}]


def test_rows_of_a_hub_dataset_are_filled_into_its_template(tmp_path: Path) -> None:
    found = read_documents(hub_dataset(tmp_path / "trivia", ROWS, "{q}\n{a}"), 0, seed=0)
    assert [text for _, text in found] == ["2 + 2?\n4", "Up?\nDown."]  # an empty one is no text
    assert len({name for name, _ in found}) == 2


@pytest.mark.parametrize("template", ["{q}\n{answer}", "{q[answer]}"])
def test_a_template_with_a_missing_column_says_what_the_rows_have(
    tmp_path: Path, template: str
) -> None:
    entry = hub_dataset(tmp_path / "trivia", ROWS, template)
    with pytest.raises(ValueError, match="'trivia'.*answer.*q, a; correct registry/datasets.yaml"):
        read_documents(entry, 0, seed=0)


def test_an_unreachable_hub_says_what_works_without_a_network() -> None:
    with pytest.raises(ConnectionError, match="'smoltalk'.*without a network.*offline"):
        read_documents(lookup("datasets", "smoltalk"), 5, seed=0)


# --- collecting ------------------------------------------------------------------------------


def test_an_interrupted_collection_goes_on_with_the_next_source(tmp_path: Path) -> None:
    wanted = (("arithmetic",), ("arithmetic-heldout",), 5, 0)  # 5 documents a data set, seed 0
    whole = collect(*wanted, make_project(tmp_path / "calm").job())
    documents, benchmarks = whole
    assert [document.source for document in documents] == ["arithmetic"] * 5
    assert [document.source for document in benchmarks] == (
        ["arithmetic-heldout"] * arithmetic.PROBLEMS
    )

    project = make_project(tmp_path / "stopped")
    stop = StopRequest()
    stop.requested = True
    with pytest.raises(Stopped, match="step 1 of 2"):
        collect(*wanted, project.job(stop=stop))
    assert collect(*wanted, project.job()) == whole
    assert project.steps() == [1, 2]
