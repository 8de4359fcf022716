"""A teacher's distribution in a student's tokens is what enumerating all texts says."""

from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from modeling.token_bytes import END, Vocabulary, vocabulary_of
from modeling.translated_rows import observe, opening_of, translate_row
from modeling.translation import PRIOR, Before, Observed, Translation
from tests.modeling.vocabularies import (
    CORPUS,
    all_texts,
    longest_match,
    random_vocabulary,
    trained_bpe,
)

LENGTH, SEEDS = 7, range(12)
MANY = 1e12  # times that something was seen, beside which a prior is nothing


@dataclass(frozen=True)
class Split:
    """A text's tokens in one vocabulary, and the bytes at which they end, 0 before the first."""

    ids: list[int]
    ends: list[int]

    @classmethod
    def of(cls, vocabulary: Vocabulary, text: bytes) -> "Split":
        ids = vocabulary.split(text)
        return cls(ids, [0, *vocabulary.ends(ids).tolist()])


@dataclass(frozen=True)
class World:
    """All texts with their chances, in two vocabularies."""

    texts: list[bytes]
    chances: np.ndarray
    teacher: list[Split]
    student: list[Split]


def make_world(seed: int) -> tuple[Vocabulary, Vocabulary, World]:
    generator = np.random.default_rng(seed)
    extra = generator.integers(0, 14, 2)
    teacher, student = (random_vocabulary(generator, n) for n in extra)
    texts = all_texts(LENGTH)
    chances = generator.dirichlet(np.full(len(texts), 0.05))
    split = [[Split.of(v, text) for text in texts] for v in (teacher, student)]
    return teacher, student, World(texts, chances, *split)


@dataclass(frozen=True)
class Scene:
    """What all texts like one say about what is behind a token of the student's.

    p (V): the teacher's next token, given that it ends beyond.  target (S): the student's.
    told: whether the teacher's next token alone decides if the student's last one ends there.
    """

    before: Before
    p: np.ndarray
    target: np.ndarray
    observed: Observed
    told: bool


def look(world: World, vocabularies: tuple[Vocabulary, Vocabulary], of: int, i: int) -> Scene:
    """The scene behind the student's token i of text `of`, by enumeration."""
    (teacher, student), mine, theirs = vocabularies, world.student[of], world.teacher[of]
    b = mine.ends[i + 1]
    j = max(n for n, end in enumerate(theirs.ends) if end <= b)
    begun = world.texts[of][theirs.ends[j] : b]
    p, kept, target = (np.zeros(20) for _ in range(3))
    firsts: dict[tuple[int, int], Counter] = defaultdict(Counter)
    for text, chance, one, other in zip(
        world.texts, world.chances, world.teacher, world.student, strict=True
    ):
        if one.ids[:j] != theirs.ids[:j] or one.ends[j + 1] <= b:
            continue
        token = one.ids[j]
        p[token] += chance
        if text[:b] == world.texts[of][:b] and other.ids[: i + 1] == mine.ids[: i + 1]:
            kept[token] += chance
            target[other.ids[i + 1]] += chance
            firsts[token, len(begun)][other.ids[i + 1]] += chance * MANY
    last = student.tokens[mine.ids[i]]
    told = True
    for token in np.flatnonzero(p):
        piece = teacher.tokens[token]
        if piece.startswith(begun):
            ends_there = student.split(last + piece[len(begun) :])[0] == mine.ids[i]
            told &= bool(np.isclose(kept[token], p[token] if ends_there else 0.0, rtol=1e-9))
    before = Before(mine.ids[i], begun, theirs.ends[j] in mine.ends)
    return Scene(before, p / p.sum(), target / target.sum(), Observed(dict(firsts)), told)


@pytest.mark.parametrize("seed", SEEDS)
def test_each_token_has_the_mass_of_all_texts_that_go_on_with_it(seed: int) -> None:
    teacher, student, world = make_world(seed)
    generator = np.random.default_rng(seed)
    seen = inside = 0
    for of in generator.choice(len(world.texts), 12, p=world.chances, replace=False):
        for i in range(len(world.student[of].ids)):
            if world.student[of].ends[i + 1] > LENGTH - 3:
                break  # the text's end would cut a token
            scene = look(world, (teacher, student), of, i)
            if not scene.told:
                continue
            p = torch.from_numpy(scene.p[: len(teacher.tokens)])[None]
            translation = Translation(teacher, student, scene.observed)
            found = translation.masses(p, [scene.before])[0].numpy()
            wanted = scene.target[: len(student.tokens)]
            np.testing.assert_allclose(found, wanted, atol=1e-6)
            seen, inside = seen + 1, inside + bool(scene.before.begun)
    assert seen >= 5


def test_most_enumerated_places_are_told_and_some_lie_inside_a_teachers_token() -> None:
    """So that the test above looks at enough of them."""
    told = inside = count = 0
    for seed in SEEDS:
        *vocabularies, world = make_world(seed)
        of = int(np.argmax(world.chances))
        for i in range(len(world.student[of].ids) - 1):
            if world.student[of].ends[i + 1] <= LENGTH - 3:
                scene = look(world, tuple(vocabularies), of, i)
                count, told = count + 1, told + scene.told
                inside += scene.told and bool(scene.before.begun)
    assert told > 0.6 * count and inside >= 3


def translate(translation: Translation, p: Tensor, begun: bytes, last: int = 0) -> Tensor:
    return translation.masses(p[None], [Before(last, begun)])[0]


def test_one_tokenizer_translates_into_itself() -> None:
    tokens = random_vocabulary(np.random.default_rng(0), 9)
    p = torch.rand(3, 12).softmax(-1)
    plain = Translation(tokens, tokens, Observed({}, {0: range(12)}))  # all were seen after 0
    torch.testing.assert_close(plain.masses(p, [Before(0, b"")] * 3), p)


def test_shares_are_those_counted_and_the_split_counts_once() -> None:
    teacher, student = longest_match("a", "b", "c"), longest_match("a", "b", "c", "ab")
    counted = Observed({(0, 0): {0: 2, 3: 1}}, {2: range(4)})
    found = translate(Translation(teacher, student, counted), torch.tensor([0.8, 0.2, 0.0]), b"", 2)
    share = 0.8 / (3 + PRIOR)
    torch.testing.assert_close(found, torch.tensor([(2 + PRIOR) * share, 0.2, 0.0, share]))


def test_inside_a_teachers_token_only_those_that_go_on_from_there_speak() -> None:
    teacher = longest_match("a", "b", "c", "ab", "abc", "ac")
    student = longest_match("a", "b", "c")
    p = torch.tensor([0.3, 0.1, 0.1, 0.2, 0.1, 0.2])
    found = translate(Translation(teacher, student), p, b"a")
    torch.testing.assert_close(found, torch.tensor([0.0, 0.6, 0.4]))


def test_what_would_have_been_a_part_of_the_last_token_is_left_out_unless_it_was_seen() -> None:
    teacher, student = longest_match("a", "b", "c", "bc"), longest_match("a", "b", "c", "ab")
    p = torch.tensor([0.2, 0.3, 0.4, 0.1])
    found = translate(Translation(teacher, student), p, b"", 0)  # behind "a" no "b" can be
    torch.testing.assert_close(found, torch.tensor([1 / 3, 0.0, 2 / 3, 0.0]))
    seen = Translation(teacher, student, Observed({}, {0: [1]}))
    torch.testing.assert_close(translate(seen, p, b"", 0), torch.tensor([0.2, 0.4, 0.4, 0.0]))


def test_where_no_token_goes_on_there_is_no_mass_and_padded_ids_are_nothing() -> None:
    tokens = longest_match("a", "b")
    p = torch.full((7,), 1 / 7)  # an embedding with 5 ids that are no tokens
    assert translate(Translation(tokens, tokens), p, b"a").tolist() == [0.0, 0.0]
    assert translate(Translation(tokens, tokens), p, b"").tolist() == [0.5, 0.5]


# --- rows ------------------------------------------------------------------------------------


@pytest.mark.parametrize("byte_level", [True, False], ids=["byte-level", "byte-fallback"])
def test_every_place_is_behind_the_bytes_that_it_says(byte_level: bool) -> None:
    """A space that the teacher puts before a document is among the bytes that it has begun."""
    small, big = trained_bpe(330), trained_bpe(500, byte_level)
    student, teacher = vocabulary_of(small), vocabulary_of(big)
    ids = [n for text in CORPUS[:3] for n in [*small(text)["input_ids"], small.eos_token_id]]
    row = np.array(ids)
    found = translate_row(row, student, big, teacher)
    assert len(found.places) == len(row)
    following = student.join(row[1:])
    for n, place in enumerate(found.places[:-1]):
        begun = place.before.begun
        assert place.before.student == row[n]
        token = teacher.tokens[found.tokens[place.at + 1]]
        assert token.startswith(begun) and len(token) > len(begun)
        rest = token[len(begun) :]
        assert following.startswith(rest) or rest == b" " == begun + rest  # "▁" alone
        following = following[len(student.tokens[row[n + 1]]) :]
    assert sum(bool(place.before.begun) for place in found.places) > 10


def test_the_end_of_a_text_is_the_other_tokenizers_end() -> None:
    small, big = trained_bpe(330), trained_bpe(420)
    student, teacher = vocabulary_of(small), vocabulary_of(big)
    assert [n for n, piece in enumerate(student.tokens) if piece == END] == [small.eos_token_id]
    p = torch.zeros(len(teacher.tokens))
    p[big.eos_token_id] = 1.0
    found = translate(Translation(teacher, student), p, b"", small.eos_token_id)
    assert found[small.eos_token_id] == 1.0


def test_positions_before_the_end_of_a_cut_character_have_no_answer() -> None:
    small, big = trained_bpe(300, texts=["plain words only\n"] * 9), trained_bpe(420)
    row = np.array(small("naïve café")["input_ids"])
    student, teacher = vocabulary_of(small), vocabulary_of(big)
    cut = 1 + next(n for n in range(len(row)) if student.tokens[row[n]] == b"\xc3")
    places = translate_row(row[cut:], student, big, teacher).places
    assert places[0] is not None and places[0].before.begun == b""  # behind the cut character
    later = translate_row(np.concatenate([row[cut:], row]), student, big, teacher).places
    assert all(place is not None for place in later)
    three = np.array(small("你好")["input_ids"])[1:]
    assert [place is None for place in translate_row(three, student, big, teacher).places[:2]] == [
        True, False,
    ]  # fmt: skip


def test_a_row_opens_as_the_tokenizer_opens_a_text() -> None:
    plain = trained_bpe(330)
    assert opening_of(plain) == [plain.eos_token_id]


def test_what_is_counted_is_what_follows_on_the_rows() -> None:
    small, big = trained_bpe(330), trained_bpe(420)
    student, teacher = vocabulary_of(small), vocabulary_of(big)
    row = np.array(small(CORPUS[0])["input_ids"])
    found = observe([row], [translate_row(row, student, big, teacher)])
    assert sum(sum(counts.values()) for counts in found.firsts.values()) == len(row) - 1
    assert found.neighbours[int(row[0])] == {
        int(b) for a, b in zip(row[:-1], row[1:], strict=True) if a == row[0]
    }
