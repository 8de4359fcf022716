"""Prepare: nothing is learnt twice, nothing that is measured is learnt, and no text is lost."""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from registry.catalog import lookup
from registry.records import Dataset, Source
from registry.strict import BadEntry
from stages.params import read_section
from stages.prepare import arithmetic
from stages.prepare.clean import (
    Document,
    drop_contaminated,
    drop_exact_duplicates,
    drop_near_duplicates,
    drop_repeated_paragraphs,
    shared_shares,
)
from stages.prepare.collect import collect
from stages.prepare.pack import pack_rows, split_of
from stages.prepare.sources import PYTHON_SOURCES, read_documents
from stages.prepare.stage import Params, limit_rows, share_rows
from stages.process import Stopped, StopRequest
from tests.tiny import REPOSITORY, make_project


def words(first: int, count: int) -> list[str]:
    """Distinct words: w7 w8 w9 ..."""
    return [f"w{number}" for number in range(first, first + count)]


def document(*text: str, source: str = "docs") -> Document:
    joined = " ".join(text)
    return Document(source, joined[:20], joined)


# --- cleaning --------------------------------------------------------------------------------


def test_exact_duplicates_are_dropped_whatever_their_spacing_and_punctuation() -> None:
    first, other = document("The cat sat."), document("A dog stood.")
    twins = [document("the  cat\nsat"), document("THE CAT, sat!")]
    assert drop_exact_duplicates([first, twins[0], other, twins[1]]) == [first, other]


def test_near_duplicates_are_dropped_and_distinct_documents_are_kept() -> None:
    original = words(0, 200)
    edited = [*original[:100], "changed", *original[101:]]  # 190 of 201 5-grams in common
    distinct = [words(1000 * n, 200) for n in range(1, 6)]
    documents = [document(*original), document(*edited), *(document(*text) for text in distinct)]
    kept = drop_near_duplicates(documents, 0.8)
    assert kept == [documents[0], *documents[2:]]


def test_documents_that_share_a_third_are_not_near_duplicates() -> None:
    documents = [document(*words(0, 200)), document(*words(100, 200))]
    assert drop_near_duplicates(documents, 0.8) == documents


@pytest.mark.parametrize("similarity", [0.3, 0.95, 0.97, 1.0])
def test_a_similarity_works_or_is_refused_before_anything_runs(similarity: float) -> None:
    params = read_section(REPOSITORY / "params.yaml", "prepare", Params)
    try:
        replace(params, near_duplicate=similarity)
    except ValueError as error:
        assert "near_duplicate" in str(error) and similarity > 0.95
        return
    twins = [document(*words(0, 60)), document(*words(0, 60)), document(*words(500, 60))]
    assert drop_near_duplicates(twins, similarity) == [twins[0], twins[2]]


def test_a_repeated_paragraph_stays_only_where_it_stands_first() -> None:
    licence, a, b = (" ".join(words(100 * n, 20)) for n in range(3))
    documents = [document(f"{a}\n\n{licence}"), document(f"{licence}\n\n{b}"), document(licence)]
    kept = drop_repeated_paragraphs(documents)
    assert [found.text for found in kept] == [f"{a}\n\n{licence}", b]
    assert [found.id for found in kept] == [documents[0].id, documents[1].id]


def test_short_paragraphs_may_repeat() -> None:
    documents = [document("Returns\n\n" + " ".join(words(n * 100, 20))) for n in range(3)]
    assert drop_repeated_paragraphs(documents) == documents


def test_what_is_left_of_a_repeated_document_is_not_an_empty_one() -> None:
    licence = " ".join(words(0, 20))
    kept = drop_repeated_paragraphs([document(licence), document(f"\n\n{licence}\n\n")])
    assert [found.text for found in kept] == [licence]


# --- decontamination -------------------------------------------------------------------------

BENCHMARK = document(*words(0, 40), source="exam")


@pytest.mark.parametrize(("shared", "dropped"), [(12, False), (13, True), (20, True)])
@pytest.mark.parametrize("at", [0, 7, 20])
def test_thirteen_words_of_a_benchmark_are_too_many(shared: int, dropped: bool, at: int) -> None:
    leak = document(*words(500, 30), *words(at, shared), *words(600, 30))
    clean = document(*words(700, 90))
    kept, counts = drop_contaminated([leak, clean], [BENCHMARK])
    assert kept == ([clean] if dropped else [leak, clean])
    assert counts == {"exam": int(dropped)}


def test_case_and_punctuation_do_not_hide_a_leak() -> None:
    leak = document("; ".join(words(5, 13)).upper())
    assert drop_contaminated([leak], [BENCHMARK]) == ([], {"exam": 1})


def test_dropped_documents_are_counted_by_benchmark() -> None:
    other = document(*words(100, 40), source="quiz")
    leaks = [document(*words(at, 15)) for at in (0, 1, 100)]
    kept, counts = drop_contaminated(leaks, [BENCHMARK, other])
    assert kept == []
    assert counts == {"exam": 2, "quiz": 1}


def test_a_benchmark_that_leaks_nowhere_is_counted_as_zero() -> None:
    assert drop_contaminated([document(*words(700, 90))], [BENCHMARK])[1] == {"exam": 0}


def test_the_shared_share_is_that_of_13_grams() -> None:
    half = document(*words(0, 26), *words(900, 13))  # 14 + 13 grams, of which 14 in BENCHMARK
    name = f"heldout_shared_13grams_{half.source}"
    there = replace(BENCHMARK, source=half.source)
    assert shared_shares([half], [there]) == {name: pytest.approx(14 / 27, abs=1e-5)}
    assert shared_shares([half], []) == {name: 0.0}


# --- splitting and packing -------------------------------------------------------------------


def test_a_split_is_chosen_by_the_document_alone() -> None:
    documents = [Document("docs", str(number), f"text {number}") for number in range(4000)]
    splits = {found.id: split_of(found, 0.1, 0.2, seed=0) for found in documents}
    changed = [replace(found, text="another text") for found in reversed(documents[:50])]
    assert all(split_of(found, 0.1, 0.2, seed=0) == splits[found.id] for found in changed)
    shares = Counter(splits.values())
    assert shares["heldout"] / 4000 == pytest.approx(0.1, abs=0.03)
    assert shares["calibration"] / 4000 == pytest.approx(0.2, abs=0.03)
    assert set(shares) == {"heldout", "calibration", "train"}


def test_a_larger_share_only_adds_heldout_documents() -> None:
    documents = [Document("docs", str(number), "") for number in range(500)]
    for found in documents:
        if split_of(found, 0.1, 0.2, seed=0) == "heldout":
            assert split_of(found, 0.15, 0.15, seed=0) == "heldout"


def test_another_seed_and_another_source_split_otherwise() -> None:
    ids = [str(number) for number in range(200)]
    chosen = [split_of(Document("docs", name, ""), 0.3, 0.3, 0) for name in ids]
    assert chosen != [split_of(Document("docs", name, ""), 0.3, 0.3, 1) for name in ids]
    assert chosen != [split_of(Document("code", name, ""), 0.3, 0.3, 0) for name in ids]


@pytest.fixture(scope="module")
def tokenizer():
    """A real tokenizer in which the word w7 is token 8, and token 0 ends a document."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<eos>": 0} | {f"w{number}": number + 1 for number in range(300)}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<eos>")


@pytest.mark.parametrize("row_tokens", [1, 4, 7, 16])
def test_packing_ends_every_document_with_eos_and_loses_only_the_rest(
    tokenizer, row_tokens: int
) -> None:
    lengths = (3, 20, 1, 9, 16)
    starts = [sum(lengths[:n]) for n in range(len(lengths))]
    documents = [document(*words(at, size)) for at, size in zip(starts, lengths, strict=True)]
    stream: list[int] = []
    for at, size in zip(starts, lengths, strict=True):
        stream += [*range(at + 1, at + size + 1), 0]
    whole = len(stream) // row_tokens
    expected = np.array(stream[: whole * row_tokens]).reshape(whole, row_tokens)
    rows = pack_rows(documents, tokenizer, row_tokens, seed=0)
    assert rows.shape == expected.shape and rows.dtype == np.int64
    assert Counter(map(tuple, rows)) == Counter(map(tuple, expected))


def test_packed_rows_are_shuffled_by_the_seed(tokenizer) -> None:
    documents = [document(*words(n, 9)) for n in range(40)]
    first, again, other = (pack_rows(documents, tokenizer, 10, seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_documents_too_short_for_a_row_give_no_row(tokenizer) -> None:
    assert pack_rows([document("w1 w2")], tokenizer, 16, seed=0).shape == (0, 16)


@pytest.mark.parametrize("limit", [3, 10, 1000])
@pytest.mark.parametrize("sizes", [(50, 50), (90, 7, 3), (1, 1, 98), (8,)])
def test_sources_share_a_limit_in_proportion_and_never_exceed_it(
    sizes: tuple[int, ...], limit: int
) -> None:
    packed = {f"source{n}": np.zeros((size, 4)) for n, size in enumerate(sizes)}
    kept = {name: len(rows) for name, rows in share_rows(packed, limit).items()}
    assert sum(kept.values()) <= limit
    for name, rows in packed.items():
        assert 1 <= kept[name] <= len(rows)
        assert abs(kept[name] - len(rows) * min(1, limit / sum(sizes))) <= 2


def test_a_limit_of_each_source_is_that(tokenizer) -> None:
    packed = {"a": np.zeros((9, 4)), "b": np.zeros((2, 4))}
    assert {name: len(rows) for name, rows in limit_rows(packed, 5).items()} == {"a": 5, "b": 2}


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
    wanted = ("arithmetic",), ("arithmetic-heldout",), 5, 0
    whole = collect(*wanted, make_project(tmp_path / "calm").job())
    assert [doc.source for doc in whole[0]] == ["arithmetic"] * 5
    assert len(whole[1]) == arithmetic.PROBLEMS

    project = make_project(tmp_path / "stopped")
    stop = StopRequest()
    stop.requested = True
    with pytest.raises(Stopped, match="step 1 of 2"):
        collect(*wanted, project.job(stop=stop))
    assert collect(*wanted, project.job()) == whole
    assert project.steps() == [1, 2]
