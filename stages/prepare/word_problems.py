"""Arithmetic word problems whose answers call `calc`, generated from a seed.

A problem is a template with names, things and numbers filled in. Its answer calls `calc` once a
step and ends with `FINAL: n`; most answers say first what is computed, in words, the others do not,
so that grpo can find out whether it pays. Results are computed here, with exact integers. Templates
(templates/README.md) for training and for measuring are different ones.
"""

import operator
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import count, cycle
from pathlib import Path

from registry.strict import strict_yaml
from stages.formats.conversations import Conversation
from stages.prepare.traces import Step, final, trace

FOLDER = Path(__file__).with_name("templates")
OPERATIONS = {
    "+": (operator.add, "Add {0} and {1}.\n"),
    "-": (operator.sub, "Subtract {1} from {0}.\n"),
    "*": (operator.mul, "Multiply {0} by {1}.\n"),
    "/": (operator.floordiv, "Divide {0} by {1}.\n"),
}
KINDS = {  # of relations (templates/README.md)
    "+": ("joined", "gained", "more", "before"),
    "-": ("lost", "gap", "rest", "less"),
    "*": ("groups", "rate", "multiple", "grid"),
    "/": ("shared", "packed", "unit", "fraction"),
}
SEVERAL = "several"  # the group of problems with more than one step
FILES = {
    "+": "addition", "-": "subtraction", "*": "multiplication", "/": "division", SEVERAL: "several"
}  # fmt: skip
GROUPS = (*OPERATIONS, SEVERAL)
LARGEST = 10**7  # of any result
IN_WORDS = 0.85  # of the answers say what is computed
TURNS = (*OPERATIONS, *OPERATIONS, SEVERAL)  # in which training problems come
TRIES = 100_000  # draws of numbers for a template; one in hundreds divides without a rest

NAMES = (
    "Ada Ben Chen Dora Emil Fatima Goran Hana Ivo Jun Kemal Lea Milan Nadia Omar Petra Quentin "
    "Rosa Samir Tara Uma Viktor Wanda Xavier Yusuf Zoe Amina Bruno Carla Dmitri Elsa Farid Greta "
    "Hugo Ines Jorge Keiko Luca Mei Noor"
).split()
THINGS = (
    "apples stamps bolts tickets coins seeds bricks cards tiles buttons pencils candles shells "
    "pebbles lemons badges stickers balloons marbles envelopes screws ribbons beads postcards "
    "chestnuts magnets spoons bulbs cups notebooks"
).split()


@dataclass(frozen=True)
class Template:
    """A question and the steps that answer it.

    number: its place among the templates of its group.  steps: (what to compute, the relation's
    kind) each; what to compute is two of a, b, c, d (numbers) and x, y (earlier results) with an
    operator between.
    """

    group: str
    number: int
    question: str
    steps: tuple[tuple[str, str], ...]


@lru_cache
def templates(split: str) -> dict[str, tuple[Template, ...]]:
    """The templates of `training` or `heldout`, by group: an operator, or SEVERAL."""
    found = {group: strict_yaml(FOLDER / split / f"{name}.yaml") for group, name in FILES.items()}
    single = {sign: _single(sign, found[sign]) for sign in OPERATIONS}
    return single | {SEVERAL: _several(found[SEVERAL])}


def training_problems(seed: int) -> Iterator[Conversation]:
    """Problems from the templates for training, one in nine of several steps; without end."""
    decks = {group: _deck(templates("training")[group], seed) for group in GROUPS}
    numbers = random.Random(f"training numbers/{seed}")
    seen: set[str] = set()
    for number, group in zip(count(), cycle(TURNS), strict=False):
        problem = fill(next(decks[group]), numbers, f"train/{seed}/{number}")
        if problem.prompt not in seen:
            seen.add(problem.prompt)
            yield problem


def heldout_problems(problems: int, seed: int) -> list[Conversation]:
    """Problems from templates that training never shows, balanced over groups and templates.

    problems: how many of one step; operations take turns. A quarter as many of several steps stand
    behind them.
    """
    numbers = random.Random(f"heldout numbers/{seed}")
    decks = {group: _deck(templates("heldout")[group], seed) for group in GROUPS}
    order = [group for _, group in zip(range(problems), cycle(OPERATIONS), strict=False)]
    order += [SEVERAL] * (problems // len(OPERATIONS))
    return [
        fill(next(decks[group]), numbers, f"heldout/{seed}/{place}")
        for place, group in enumerate(order)
    ]


def fill(template: Template, rng: random.Random, id: str) -> Conversation:
    """A problem from a template, with its answer."""
    values, results = _numbers(template, rng)
    name, other = rng.sample(NAMES, 2)
    words = {"name": name, "other": other, "things": rng.choice(THINGS)}
    steps, in_words = [], rng.random() < IN_WORDS
    for (compute, _), result in zip(template.steps, results, strict=True):
        left, sign, right = _in_order(compute, template.question)
        operands = values[left], values[right]
        said = OPERATIONS[sign][1].format(*operands) if in_words else ""
        steps.append(Step(said, "calc", {"expression": f"{sign.join(map(str, operands))}"}, result))
    return Conversation(
        id=id,
        capability="arithmetic",
        segments=trace(template.question.format(**words, **values), steps, final(results[-1])),
        answer=str(results[-1]),
        facts={
            "operation": template.group,
            "kind": " ".join(kind for _, kind in template.steps),
            "template": template.number,
            "steps": len(steps),
        },
    )


def _single(sign: str, questions: dict[str, list[str]]) -> tuple[Template, ...]:
    """Templates of one step, from questions by kind."""
    told = [(kind, question) for kind, found in questions.items() for question in found]
    return tuple(
        Template(sign, number, question, ((f"a{sign}b", kind),))
        for number, (kind, question) in enumerate(told)
    )


def _several(entries: list[dict]) -> tuple[Template, ...]:
    return tuple(
        Template(
            SEVERAL,
            number,
            entry["question"],
            tuple((step["compute"], step["kind"]) for step in entry["steps"]),
        )
        for number, entry in enumerate(entries)
    )


def _deck(cards: tuple[Template, ...], seed: int) -> Iterator[Template]:
    """All templates in a random order, again and again in other orders."""
    rng = random.Random(f"deck/{cards[0].group}/{seed}")
    while True:
        yield from rng.sample(cards, len(cards))


def _numbers(template: Template, rng: random.Random) -> tuple[dict[str, int], list[int]]:
    """Numbers for which every step gives a whole positive number, and what the steps give."""
    letters = sorted({letter for compute, _ in template.steps for letter in _parts(compute)[::2]})
    small = {_parts(compute)[2] for compute, _ in template.steps if compute[1] in "*/"}
    for _ in range(TRIES):
        values = {
            letter: _draw(rng, 2 if letter in small else 4) for letter in letters if letter < "x"
        }
        results = _compute(template, values)
        if results:
            return values, results
    raise ValueError(f"no numbers found for {template.question!r}; correct its steps")


def _draw(rng: random.Random, most_digits: int) -> int:
    """A number of at least two digits; each count of digits is as likely as another."""
    digits = rng.randint(2, most_digits)
    return rng.randint(10 ** (digits - 1), 10**digits - 1)


def _compute(template: Template, values: dict[str, int]) -> list[int]:
    """The results of the steps, also put into `values` as x and y; [] where one does not fit."""
    results = []
    for (compute, _), letter in zip(template.steps, "xyz", strict=False):
        left, sign, right = _parts(compute)
        first, second = values[left], values[right]
        if sign == "/" and first % second:
            return []
        values[letter] = OPERATIONS[sign][0](first, second)
        results.append(values[letter])
        if not 2 <= results[-1] <= LARGEST:
            return []
    return results


def _in_order(compute: str, question: str) -> tuple[str, str, str]:
    """The parts of "a+b" or "a*b" as the question names them: which comes first tells nothing."""
    left, sign, right = _parts(compute)
    if sign in "+*" and 0 <= question.find(f"{{{right}}}") < question.find(f"{{{left}}}"):
        left, right = right, left
    return left, sign, right


def _parts(compute: str) -> tuple[str, str, str]:
    """The left operand, the operator and the right operand of e.g. "x-c"."""
    left, sign, right = compute
    return left, sign, right
