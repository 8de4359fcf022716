"""Alignment: what is said about the student's next token is what enumerating all texts says."""

import numpy as np
import pytest

from modeling.alignment import (
    MOST_CANDIDATES,
    AlignedArrays,
    Candidates,
    bucket_targets,
    find_candidates,
    find_spans,
)
from modeling.token_bytes import END, Vocabulary, encode, encode_bytes, vocabulary_of
from tests.modeling.vocabularies import (
    CORPUS,
    all_texts,
    longest_match,
    random_vocabulary,
    trained_bpe,
)

NO_SPAN = np.array([-np.inf])
SEEDS = range(12)


def pairs(candidates: Candidates, teacher: Vocabulary) -> set[tuple[int, int]]:
    owner, ids = candidates.of(np.arange(len(teacher.tokens)))
    return set(zip(owner.tolist(), ids.tolist(), strict=True))


def first_masses(vocabulary: Vocabulary, chances: dict[bytes, float]) -> np.ndarray:
    """The probability of each token to be the first of a text."""
    masses = np.zeros(len(vocabulary.tokens))
    for text, chance in chances.items():
        masses[vocabulary.split(text)[0]] += chance
    return masses


def random_chances(generator: np.random.Generator) -> dict[bytes, float]:
    texts = all_texts(6)
    return dict(zip(texts, generator.dirichlet(np.full(len(texts), 0.05)), strict=True))


def top_of(masses: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    order = np.argsort(-masses)[:k]
    return (
        order[None],
        np.log(np.maximum(masses[order], 1e-300))[None],
        1 - masses[order].sum()[None],
    )


def two_vocabularies(seed: int) -> tuple[np.random.Generator, Vocabulary, Vocabulary]:
    generator = np.random.default_rng(seed)
    extra = generator.integers(0, 14, 2)
    return generator, random_vocabulary(generator, extra[0]), random_vocabulary(generator, extra[1])


def members(arrays: AlignedArrays, row: int = 0) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for token, group in zip(arrays.ids[row], arrays.groups[row], strict=True):
        if token >= 0:
            found.setdefault(int(group), []).append(int(token))
    return found


# --- candidates ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_candidates_are_the_first_tokens_that_some_text_has(seed: int) -> None:
    _, teacher, student = two_vocabularies(seed)
    texts = [text for length in range(1, 6) for text in all_texts(length)]
    there = {(teacher.split(text)[0], student.split(text)[0]) for text in texts}
    assert pairs(find_candidates(teacher, student), teacher) == there


def test_one_tokenizer_has_itself_as_candidates() -> None:
    tokens = random_vocabulary(np.random.default_rng(0), 9)
    assert pairs(find_candidates(tokens, tokens), tokens) == {(n, n) for n in range(12)}


def test_a_longer_token_of_the_student_is_a_candidate_only_of_what_the_teacher_begins_it_with() -> (
    None
):
    teacher = longest_match("a", "b", "ab", "c")
    student = longest_match("a", "b", "abc", "c")
    found = find_candidates(teacher, student)
    assert found.of(np.array([0]))[1].tolist() == [0]  # a text of "ab" never begins with "a" alone
    assert sorted(found.of(np.array([2]))[1].tolist()) == [0, 2]  # "ab" may be "a" or "abc"


def test_tokens_without_text_and_beyond_the_vocabulary_have_no_candidates() -> None:
    plain = longest_match("a", "b")
    teacher = Vocabulary((*plain.tokens, None, b""), plain.split)
    assert find_candidates(teacher, plain).of(np.array([2, 3, 4, 400]))[1].tolist() == []


def test_the_first_tokens_of_real_text_are_candidates_of_each_other() -> None:
    """Approximation (a) of the module: rare in BPE."""
    big, small = trained_bpe(420), trained_bpe(330)
    for one, other in ((big, small), (small, big)):
        teacher, student = vocabulary_of(one), vocabulary_of(other)
        allowed = pairs(find_candidates(teacher, student), teacher)
        text = "".join(CORPUS[:3])
        t_ids, t_ends = encode(one, teacher, text)
        s_ids, s_ends = encode(other, student, text)
        spans = find_spans(s_ends, t_ends)
        seen = [
            (t_ids[t + 1], s_ids[s + 1]) in allowed
            for s, t in zip(spans.student[:-1], spans.teacher[:-1], strict=True)
        ]
        assert len(seen) >= 50 and np.mean(seen) > 0.95


# --- buckets ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_each_bucket_has_the_students_mass_when_all_is_stored(seed: int) -> None:
    generator, teacher, student = two_vocabularies(seed)
    chances = random_chances(generator)
    known, wanted = (first_masses(v, chances) for v in (teacher, student))
    candidates = find_candidates(teacher, student)
    first = (np.array([0]), np.array([0]))
    arrays = bucket_targets(candidates, top_of(known, len(known)), first, NO_SPAN)
    buckets = members(arrays)
    assert sorted(token for bucket in buckets.values() for token in bucket) == list(
        range(len(wanted))
    )  # a partition
    for group, bucket in buckets.items():
        assert arrays.masses[0, group] == pytest.approx(wanted[bucket].sum(), abs=1e-9)
    assert arrays.masses.sum() == pytest.approx(1.0)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("k", [1, 2, 4])
def test_a_bucket_is_too_small_by_no_more_than_the_tail(seed: int, k: int) -> None:
    """Approximation (b)."""
    generator, teacher, student = two_vocabularies(seed)
    chances = random_chances(generator)
    known, wanted = (first_masses(v, chances) for v in (teacher, student))
    top = top_of(known, min(k, len(known)))
    first = (np.array([0]), np.array([0]))
    arrays = bucket_targets(find_candidates(teacher, student), top, first, NO_SPAN)
    for group, bucket in members(arrays).items():
        lacking = wanted[bucket].sum() - arrays.masses[0, group]
        assert -1e-9 < lacking < top[2][0] + 1e-9
    assert arrays.masses.sum() + arrays.tail[0] == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_span_is_a_part_of_its_own_and_its_buckets_remainder_is_tail(seed: int) -> None:
    generator, teacher, student = two_vocabularies(seed)
    chances = random_chances(generator)
    known, wanted = (first_masses(v, chances) for v in (teacher, student))
    text = max(chances, key=chances.get)
    ends = [np.cumsum([len(v.tokens[n]) for n in v.split(text)]) for v in (student, teacher)]
    meeting = int(np.intersect1d(*ends)[0])
    span = [v.split(text[:meeting]) for v in (teacher, student)]
    likely = sum(c for t, c in chances.items() if teacher.split(t)[: len(span[0])] == span[0])
    first = (np.array(span[0][:1]), np.array(span[1][:1]))
    top = top_of(known, len(known))
    arrays = bucket_targets(
        find_candidates(teacher, student), top, first, np.array([np.log(likely)])
    )
    buckets = members(arrays)
    assert span[1][0] not in [token for bucket in buckets.values() for token in bucket]
    for group, bucket in buckets.items():
        assert arrays.masses[0, group] == pytest.approx(wanted[bucket].sum(), abs=1e-9)
    left = 1 - sum(wanted[bucket].sum() for bucket in buckets.values()) - likely
    assert arrays.tail[0] == pytest.approx(max(left, 1e-7), abs=1e-9)


def test_tokens_that_share_a_candidate_are_one_bucket_and_others_are_not() -> None:
    teacher = longest_match("a", "b", "c", "ab", "ac", "cc")
    student = longest_match("a", "b", "c", "cc")
    masses = np.array([0.1, 0.2, 0.05, 0.25, 0.3, 0.1])
    first = (np.array([0]), np.array([0]))
    arrays = bucket_targets(find_candidates(teacher, student), top_of(masses, 6), first, NO_SPAN)
    found = {tuple(bucket): arrays.masses[0, g] for g, bucket in members(arrays).items()}
    assert found == pytest.approx({(0,): 0.65, (1,): 0.2, (2,): 0.05, (3,): 0.1})
    assert arrays.shares() == pytest.approx(
        {"one_token": 1.0, "several_tokens": 0.0, "spans": 0.0, "tail": 1e-7}
    )


def test_a_token_with_too_many_candidates_takes_them_all_to_the_tail() -> None:
    longer = [f"a{chr(0x4E00 + n)}" for n in range(MOST_CANDIDATES)]
    teacher = longest_match("a", "b")
    student = longest_match("a", "b", *longer)
    first = (np.array([0]), np.array([0]))
    top = top_of(np.array([0.7, 0.3]), 2)
    arrays = bucket_targets(find_candidates(teacher, student), top, first, NO_SPAN)
    assert members(arrays) == {1: [1]} and arrays.tail[0] == pytest.approx(0.7)


def test_rows_do_not_mix() -> None:
    _, teacher, student = two_vocabularies(3)
    candidates = find_candidates(teacher, student)
    generator = np.random.default_rng(0)
    tops = [top_of(generator.dirichlet(np.ones(len(teacher.tokens))), 3) for _ in range(5)]
    together = bucket_targets(
        candidates,
        tuple(np.concatenate(column) for column in zip(*tops, strict=True)),
        (np.zeros(5, np.int64), np.zeros(5, np.int64)),
        np.full(5, -np.inf),
    )
    for row, top in enumerate(tops):
        alone = bucket_targets(candidates, top, (np.array([0]), np.array([0])), NO_SPAN)
        assert members(together, row) == members(alone)
        assert np.array_equal(together.masses[row], alone.masses[0])
        assert together.tail[row] == alone.tail[0]


# --- spans -----------------------------------------------------------------------------------


def test_spans_lie_between_the_boundaries_that_both_have() -> None:
    spans = find_spans(np.array([2, 4, 5, 9]), np.array([1, 4, 6, 7, 9]))
    assert spans.student.tolist() == [1, 3] and spans.teacher.tolist() == [1, 4]


def test_of_a_token_without_bytes_the_last_counts() -> None:
    spans = find_spans(np.array([0, 3, 5]), np.array([0, 0, 3, 5]))
    assert spans.student.tolist() == [0, 1, 2] and spans.teacher.tolist() == [1, 2, 3]


def test_rows_of_two_texts_are_refused() -> None:
    with pytest.raises(ValueError, match="5 bytes and the teacher's 6"):
        find_spans(np.array([2, 5]), np.array([2, 6]))


@pytest.mark.parametrize("teacher_is", ["byte-level", "byte-fallback"])
def test_spans_of_rows_of_documents_are_of_the_same_bytes(teacher_is: str) -> None:
    """A space that one tokenizer puts before a document is never taken for the document's."""
    small, other = trained_bpe(330), trained_bpe(500, teacher_is == "byte-level")
    student, teacher = vocabulary_of(small), vocabulary_of(other)
    row = END.join(text.encode() for text in CORPUS[:3]) + END + b"and then" + END
    s_ids, s_ends = encode_bytes(small, student, row)
    t_ids, t_ends = encode_bytes(other, teacher, row)
    spans = find_spans(s_ends, t_ends)
    exact = 0
    for n in range(len(spans.student) - 1):
        mine = student.join(s_ids[spans.student[n] + 1 : spans.student[n + 1] + 1])
        theirs = teacher.join(t_ids[spans.teacher[n] + 1 : spans.teacher[n + 1] + 1])
        exact += mine == theirs
        assert theirs in (mine, mine.replace(END, END + b" "))
    assert exact > 25
