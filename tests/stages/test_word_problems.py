"""Word problems: every template is sound, every answer right, and what is held out is other."""

import json
import random
import re
import string
from collections import Counter
from fractions import Fraction
from itertools import islice

import pytest

from stages.formats.conversations import Conversation
from stages.prepare.clean import SHINGLE_WORDS, WORD
from stages.prepare.word_problems import (
    GROUPS,
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
ALL = [template for split in SPLITS for group in GROUPS for template in templates(split)[group]]

every_template = pytest.mark.parametrize("template", ALL, ids=lambda found: found.question[:40])


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
        sentence, _, call = own.partition("\n")
        expression = json.loads(call.removeprefix("<<calc>>"))["expression"]
        assert set(re.findall(r"\d+", expression)) <= known, "out of thin air"
        assert re.findall(r"\d+", sentence), "the sentence says what is computed"
        value = value_of(expression)
        assert result == f"<<result>>{value}\n" and value.denominator == 1 and value > 1
        known.add(str(value))
    assert problem.segments[-1] == ("own", f"FINAL: {value}")
    assert problem.answer == str(value)


@pytest.mark.parametrize(
    ("split", "single", "several"), [("training", 60, 30), ("heldout", 16, 12)]
)
def test_there_are_enough_templates(split: str, single: int, several: int) -> None:
    counts = {group: len(found) for group, found in templates(split).items()}
    assert tuple(counts) == GROUPS
    assert min(counts[operation] for operation in OPERATIONS) >= single
    assert counts[SEVERAL] >= several
    lengths = Counter(len(template.steps) for template in templates(split)[SEVERAL])
    assert set(lengths) == {2, 3} and min(lengths.values()) >= 4


@every_template
def test_a_template_uses_all_its_numbers_and_computes_with_what_it_has(template: Template) -> None:
    operands = [compute[0] + compute[2] for compute, _ in template.steps]
    used = {letter for pair in operands for letter in pair}
    results = set("xyz"[: len(template.steps) - 1])
    assert used == (placeholders(template.question) - WORDS) | results
    for place, pair in enumerate(operands):
        assert set(pair) & set("xyz") <= set("xyz"[:place]), "a result is used before it is there"
    for _, why in template.steps:
        assert placeholders(why) <= placeholders(template.question) & WORDS


@every_template
def test_a_template_reads_like_a_question_and_a_reason(template: Template) -> None:
    assert template.question.endswith("?") and "  " not in template.question
    assert template.question[0] in string.ascii_uppercase + "{"
    for _, why in template.steps:
        assert why[0].isupper() and why[-1] not in ".,;" and not re.search(r"\d", why)
        assert len(why.split()) <= 16


def test_no_question_and_no_reason_stands_twice() -> None:
    questions = Counter(template.question for template in ALL)
    assert max(questions.values()) == 1
    for split in SPLITS:
        for operation in OPERATIONS:
            reasons = Counter(
                why for found in templates(split)[operation] for _, why in found.steps
            )
            assert max(reasons.values()) <= 2, reasons.most_common(1)


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
    pairs = [
        (len(own & other) / len(own | other), found.question, second.question)
        for place, (found, own) in enumerate(train)
        for second, other in train[:place]
    ]
    assert max(pairs)[0] < 0.35, max(pairs)


@every_template
def test_every_template_gives_right_answers(template: Template) -> None:
    for seed in range(3):
        problem = fill(template, random.Random(seed), "one")
        check_answer(problem)
        assert "{" not in problem.prompt
        numbers = [int(found) for found in re.findall(r"\d+", problem.prompt)]
        assert all(10 <= number <= 9999 for number in numbers)


def test_training_problems_take_turns_and_never_repeat() -> None:
    problems = list(islice(training_problems(seed=0), 1500))
    counts = Counter(problem.facts["operation"] for problem in problems)
    assert max(counts.values()) - min(counts.values()) <= 3
    assert len({problem.prompt for problem in problems}) == 1500
    used = Counter((found.facts["operation"], found.facts["template"]) for found in problems)
    assert len(used) == sum(len(templates("training")[group]) for group in GROUPS)
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
