"""Prepare: nothing is learnt twice, nothing that is measured is learnt, and no text is lost."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from stages.params import read_section
from stages.prepare.clean import (
    Document,
    drop_contaminated,
    drop_exact_duplicates,
    drop_near_duplicates,
    drop_repeated_paragraphs,
    shared_shares,
)
from stages.prepare.pack import pack_rows, split_of
from stages.prepare.stage import Params, limit_rows, share_rows
from tests.tiny import REPOSITORY


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


def test_the_shared_share_is_that_of_13_grams_within_a_source() -> None:
    half = document(*words(0, 26), *words(900, 13))  # 14 + 13 grams, of which 14 in BENCHMARK
    alone = document(*words(0, 26), source="exam")  # all of its grams, but in another source
    shared, own = (f"heldout_shared_13grams_{name}" for name in ("docs", "exam"))
    twin = replace(BENCHMARK, source="docs")
    assert shared_shares([half, alone], [twin]) == {
        shared: pytest.approx(14 / 27, abs=1e-5),
        own: 0,
    }
    assert shared_shares([], [BENCHMARK]) == {}


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
