"""Word problems: every template is sound, every answer right, and what is held out is other."""

import json
import random
import re
import string
from collections import Counter
from fractions import Fraction
from itertools import combinations, islice, product

import pytest

from stages.formats.conversations import Conversation
from stages.prepare.clean import SHINGLE_WORDS, WORD
from stages.prepare.word_problems import (
    GROUPS,
    KINDS,
    OPERATIONS,
    SEVERAL,
    Template,
    fill,
    heldout_problems,
    templates,
    training_problems,
)

SPLITS = ("training", "heldout")
WORDS = {"name", "other", "things"}
MOST_ALIKE = 0.12  # Jaccard index of word 5-grams, of a held-out question and any training one
ALL = {f"{split} {group}": templates(split)[group] for split in SPLITS for group in GROUPS}

every_group = pytest.mark.parametrize("group", list(ALL))


def placeholders(text: str) -> set[str]:
    return {field for _, field, _, _ in string.Formatter().parse(text) if field}


def value_of(expression: str) -> Fraction:
    """An expression of two whole numbers, worked out apart from the code under test."""
    first, sign, second = re.fullmatch(r"(\d+)([-+*/])(\d+)", expression).groups()
    a, b = Fraction(first), Fraction(second)
    return a + b if sign == "+" else a - b if sign == "-" else a * b if sign == "*" else a / b


def check_answer(problem: Conversation) -> None:
    """Each call's result is the value of its expression, made of numbers that stand before it."""
    known = set(re.findall(r"\d+", problem.prompt))
    kinds = [kind for kind, _ in problem.segments]
    for position in (at for at, kind in enumerate(kinds) if kind == "result"):
        own, result = problem.segments[position - 1][1], problem.segments[position][1]
        sentence, _, call = own.rpartition("<<calc>>")
        expression = json.loads(call)["expression"]
        operands = set(re.findall(r"\d+", expression))
        assert operands <= known, "out of thin air"
        assert not sentence or set(re.findall(r"\d+", sentence)) == operands
        value = value_of(expression)
        assert result == f"<<result>>{value}\n" and value.denominator == 1 and value > 1
        known.add(str(value))
    assert problem.segments[-1] == ("own", f"FINAL: {value}")
    assert problem.answer == str(value)


@pytest.mark.parametrize(
    ("split", "single", "several"), [("training", 1200, 150), ("heldout", 16, 12)]
)
def test_there_are_enough_templates(split: str, single: int, several: int) -> None:
    counts = {group: len(found) for group, found in templates(split).items()}
    assert tuple(counts) == GROUPS
    assert min(counts[operation] for operation in OPERATIONS) >= single
    assert counts[SEVERAL] >= several
    lengths = Counter(len(template.steps) for template in templates(split)[SEVERAL])
    assert set(lengths) == {2, 3} and min(lengths.values()) >= 4


@every_group
def test_a_template_uses_all_its_numbers_and_computes_with_what_it_has(group: str) -> None:
    for template in ALL[group]:
        operands = [compute[0] + compute[2] for compute, _ in template.steps]
        used = {letter for pair in operands for letter in pair}
        results = set("xyz"[: len(template.steps) - 1])
        assert used == (placeholders(template.question) - WORDS) | results, template
        for place, pair in enumerate(operands):
            assert set(pair) & set("xyz") <= set("xyz"[:place]), "a result before it is there"


@every_group
def test_a_template_reads_like_a_request_and_has_a_kind(group: str) -> None:
    for template in ALL[group]:
        assert template.question[-1] in "?." and "  " not in template.question, template
        assert template.question[0] in string.ascii_uppercase + "{'", template
        for compute, kind in template.steps:
            assert kind in KINDS[compute[1]], template


def test_no_question_stands_twice() -> None:
    questions = Counter(template.question for found in ALL.values() for template in found)
    assert max(questions.values()) == 1


def test_most_answers_say_what_they_compute_and_the_others_call_at_once() -> None:
    problems = list(islice(training_problems(seed=0), 600))
    silent = sum(found.segments[1][1].startswith("<<calc>>") for found in problems)
    assert 60 < silent < 120
    said = {found.segments[1][1].split()[0] for found in problems}
    assert said >= {"Add", "Subtract", "Multiply", "Divide"}


def grams(template: Template) -> set[str]:
    words = WORD.findall(template.question.lower())
    return {
        " ".join(words[at : at + SHINGLE_WORDS]) for at in range(len(words) - SHINGLE_WORDS + 1)
    }


def test_held_out_templates_are_worded_unlike_all_training_ones() -> None:
    train = [(found, grams(found)) for group in GROUPS for found in templates("training")[group]]
    near = []
    for held in (found for group in GROUPS for found in templates("heldout")[group]):
        own = grams(held)
        for found, other in train:
            alike = len(own & other) / len(own | other)
            if alike > MOST_ALIKE:
                near.append(f"{alike:.2f}: {held.question} ~ {found.question}")
    assert not near, "\n".join(near)


def test_training_templates_are_not_paraphrases_of_each_other() -> None:
    train = [(found, grams(found)) for group in GROUPS for found in templates("training")[group]]
    sharing: dict[str, list[int]] = {}
    for place, (_, own) in enumerate(train):
        for gram in own:
            sharing.setdefault(gram, []).append(place)
    pairs = {pair for places in sharing.values() for pair in combinations(places, 2)}
    for first, second in pairs:
        (found, own), (twin, other) = train[first], train[second]
        alike = len(own & other) / len(own | other)
        assert alike < 0.35, (alike, found.question, twin.question)


@every_group
def test_every_template_gives_right_answers(group: str) -> None:
    for template, seed in product(ALL[group], range(3)):
        problem = fill(template, random.Random(seed), "one")
        check_answer(problem)
        assert "{" not in problem.prompt
        numbers = [int(found) for found in re.findall(r"\d+", problem.prompt)]
        assert all(10 <= number <= 9999 for number in numbers)


def test_training_problems_take_turns_and_never_repeat() -> None:
    problems = list(islice(training_problems(seed=0), 2500))
    counts = Counter(problem.facts["operation"] for problem in problems)
    single = [counts[operation] for operation in OPERATIONS]
    assert max(single) - min(single) <= 3 and 270 <= counts[SEVERAL] <= 280
    assert len({problem.prompt for problem in problems}) == 2500
    for group, cards in templates("training").items():  # none again before all have been there
        used = Counter(
            found.facts["template"] for found in problems if found.facts["operation"] == group
        )
        assert len(used) == min(counts[group], len(cards))
        assert max(used.values()) <= 1 + counts[group] // len(cards)
    for problem in problems[:50]:
        check_answer(problem)


def test_held_out_problems_are_balanced_over_operations_and_templates() -> None:
    problems = heldout_problems(192, seed=0)
    single = [found for found in problems if found.facts["steps"] == 1]
    counts = Counter(found.facts["operation"] for found in problems)
    assert len(single) == 192 and counts == dict.fromkeys(GROUPS, 48)
    used = Counter((found.facts["operation"], found.facts["template"]) for found in single)
    assert max(used.values()) - min(used.values()) <= 1
    for problem in problems:
        check_answer(problem)


def test_a_seed_gives_the_same_problems_and_another_seed_others() -> None:
    assert heldout_problems(40, seed=1) == heldout_problems(40, seed=1)
    first, second = ({found.prompt for found in heldout_problems(40, seed=n)} for n in (1, 2))
    assert not first & second
    train = [[found.prompt for found in islice(training_problems(n), 40)] for n in (0, 0, 1)]
    assert train[0] == train[1] != train[2]
