"""Word problems with worked answers, generated from a seed.

Templates for training and for measuring are different ones, so that a student who has only
learnt the templates by heart is found out.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import yaml

PROBLEMS = 4000  # more than any preset asks for
NAMES = "Ada Ben Chen Dora Emil Fatima Goran Hana Ivo Jun Kemal Lea".split()
THINGS = "apples stamps bolts tickets pages coins seeds bricks cards tiles".split()


@dataclass(frozen=True)
class Template:
    """A question, the operation that answers it, and the sentence that works it out."""

    operation: str
    question: str
    working: str


def training_problems(seed: int) -> Iterator[tuple[str, str]]:
    """Problems from the training templates, as (id, text)."""
    return _problems("training", seed)


def heldout_problems(seed: int) -> Iterator[tuple[str, str]]:
    """Problems from templates that training never shows, as (id, text)."""
    return _problems("heldout", seed)


@lru_cache
def _templates() -> dict[str, tuple[Template, ...]]:
    content = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    return {kind: tuple(Template(**entry) for entry in content[kind]) for kind in content}


def _problems(kind: str, seed: int) -> Iterator[tuple[str, str]]:
    templates = _templates()[kind]
    rng = random.Random(f"{kind}/{seed}")
    for number in range(PROBLEMS):
        template = templates[number % len(templates)]
        a, b, result = _numbers(template.operation, rng)
        text = f"Question: {template.question}\nAnswer: {template.working} The answer is {{r}}."
        name, things = rng.choice(NAMES), rng.choice(THINGS)
        filled = text.format(name=name, things=things, a=a, b=b, r=result)
        yield f"arithmetic/{kind}/{number}", filled


def _numbers(operation: str, rng: random.Random) -> tuple[int, int, int]:
    """Two operands and their exact, positive result."""
    if operation == "+":
        a, b = rng.randint(10, 999), rng.randint(10, 999)
        return a, b, a + b
    if operation == "-":
        a, b = sorted((rng.randint(10, 999), rng.randint(10, 999)), reverse=True)
        return a, b, a - b
    small, large = rng.randint(2, 12), rng.randint(10, 99)
    product = small * large
    return (large, small, product) if operation == "*" else (product, small, large)
