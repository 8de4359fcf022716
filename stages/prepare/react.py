"""Traces in ReAct form over calc, py and bash, generated from small tables.

    Thought: ...                        own text
    Action: <<calc>>{...}               own text, a call
    Observation                         the result, which the runtime inserts
    Thought: ...  FINAL: ...            own text

No tool runs here: each task's function works its results out in its own way, in plain Python.
"""

import math
import random
from collections.abc import Callable
from functools import lru_cache
from itertools import count, cycle
from pathlib import Path
from typing import Any

from registry.strict import strict_yaml
from stages.formats.conversations import Conversation
from stages.prepare.traces import Step, final, trace

Values = dict[str, Any]  # what fills a task's placeholders; r1 and r2 are the results of its calls

ITEMS = ("a tent", "a lamp", "a bicycle", "a desk", "a camera", "a kettle", "a suitcase", "a drill")
WORDS = (
    "strawberry bookkeeper mississippi onomatopoeia parallel committee assessment refrigerator "
    "kubernetes deployment successfully unbelievable bananas encyclopedia necessary tomorrow"
).split()
HOSTS = "alpha beta gamma delta epsilon zeta kappa sigma omega".split()
FILES = "core.dump old.iso video.mp4 backup.tar db.sqlite trace.log image.raw".split()
LEVELS = ("ERROR", "WARN", "INFO")
MESSAGES = (
    "disk almost full", "request done", "connection lost", "retrying", "cache cleared",
    "user logged in", "timeout after 30 s", "job queued",
)  # fmt: skip


def discount(rng: random.Random) -> Values:
    """A price with a discount that comes to whole dollars."""
    price, percent = 100 * rng.randint(1, 60), rng.randint(3, 60)
    off = price // 100 * percent
    item = rng.choice(ITEMS)
    return {"item": item, "price": price, "percent": percent, "r1": off, "r2": price - off}


def recipe(rng: random.Random) -> Values:
    """An amount for some people, scaled to others."""
    people, guests, each = rng.randint(2, 12), rng.randint(13, 90), rng.randint(15, 240)
    amount = people * each
    return {"people": people, "guests": guests, "grams": amount, "r1": each, "r2": each * guests}


def average(rng: random.Random) -> Values:
    """Three numbers with a whole mean."""
    mean = rng.randint(100, 900)
    low, high = rng.randint(1, 90), rng.randint(1, 90)
    a, b, c = mean - low, mean + high, mean + low - high
    return {"a": a, "b": b, "c": c, "r1": 3 * mean, "r2": mean}


def letters(rng: random.Random) -> Values:
    """A letter to count in a word."""
    word = rng.choice(WORDS)
    letter = rng.choice(word)
    return {"word": word, "letter": letter, "r1": len([one for one in word if one == letter])}


def backwards(rng: random.Random) -> Values:
    """A word to turn round."""
    word = "".join(rng.sample(rng.choice(WORDS), 6))
    return {"word": word, "r1": "".join(reversed(word))}


def second(rng: random.Random) -> Values:
    """Distinct numbers of which the second largest is wanted."""
    numbers = rng.sample(range(10, 999), rng.randint(5, 8))
    rest = set(numbers) - {max(numbers)}
    return {"numbers": ", ".join(map(str, numbers)), "r1": max(rest)}


def multiples(rng: random.Random) -> Values:
    """A divisor and a limit; the sum by Gauss's formula."""
    divisor, limit = rng.randint(3, 30), rng.randint(100, 2000)
    terms = limit // divisor
    return {"divisor": divisor, "limit": limit, "r1": divisor * terms * (terms + 1) // 2}


def common(rng: random.Random) -> Values:
    """Two numbers made of a common part and two coprime ones."""
    while True:
        part, first, other = (rng.randint(2, 60) for _ in range(3))
        if first != other and math.gcd(first, other) == 1:
            return {"a": part * first, "b": part * other, "r1": part}


def binary(rng: random.Random) -> Values:
    """A number and its binary digits, by repeated halving."""
    number = rest = rng.randint(17, 1023)
    digits = ""
    while rest:
        digits, rest = str(rest % 2) + digits, rest // 2
    return {"number": number, "r1": digits}


def lines(rng: random.Random) -> Values:
    """A log, and a level to count in it."""
    levels = [rng.choice(LEVELS) for _ in range(rng.randint(5, 9))]
    log = "\n".join(f"{level} {rng.choice(MESSAGES)}" for level in levels)
    level = rng.choice(levels)
    return {"log": log, "level": level, "r1": str(levels.count(level))}


def distinct(rng: random.Random) -> Values:
    """A list of hosts with repetitions."""
    hosts = [rng.choice(HOSTS) for _ in range(rng.randint(6, 10))]
    return {"hosts": "\n".join(hosts), "r1": str(len(set(hosts)))}


def largest(rng: random.Random) -> Values:
    """Files with distinct sizes."""
    names = rng.sample(FILES, rng.randint(4, 6))
    sizes = dict(zip(names, rng.sample(range(11, 4000), len(names)), strict=True))
    listing = "\n".join(f"{size} {name}" for name, size in sizes.items())
    return {"sizes": listing, "r1": max(sizes, key=sizes.__getitem__)}


def cost(rng: random.Random) -> Values:
    """A log whose lines of a level each cost something."""
    values, price = lines(rng), rng.randint(12, 99)
    return {**values, "price": price, "r2": int(values["r1"]) * price}


TASKS: dict[str, Callable[[random.Random], Values]] = {
    function.__name__: function
    for function in (
        discount, recipe, average, letters, backwards, second, multiples, common, binary, lines,
        distinct, largest, cost,
    )
}  # fmt: skip


def react_traces(split: str, conversations: int, seed: int) -> list[Conversation]:
    """Up to so many distinct traces of a split, `training` or `heldout`; tasks take turns."""
    rng = random.Random(f"react/{split}/{seed}")
    found: dict[str, Conversation] = {}
    turns = zip(range(20 * conversations), cycle(TASKS), strict=False)
    for number, task in turns:
        made = _trace(task, split, rng, f"{split}/{seed}/{number}")
        found.setdefault(made.prompt, made)
        if len(found) == conversations:
            break
    return list(found.values())


@lru_cache
def tasks() -> dict[str, dict[str, Any]]:
    """Questions and steps of each task."""
    return strict_yaml(Path(__file__).with_suffix(".yaml"))


def _trace(task: str, split: str, rng: random.Random, id: str) -> Conversation:
    entry, values = tasks()[task], TASKS[task](rng)
    question = rng.randrange(len(entry[split]))
    results = [values[f"r{number}"] for number, _ in zip(count(1), entry["steps"], strict=False)]
    steps = [
        Step(
            f"Thought: {step['thought'].format(**values)}\nAction: ",
            step["tool"],
            _filled(step["arguments"], values),
            result,
        )
        for step, result in zip(entry["steps"], results, strict=True)
    ]
    closing = f"Thought: That answers the question.\n{final(results[-1])}"
    return Conversation(
        id=id,
        capability="tools",
        segments=trace(entry[split][question].format(**values), steps, closing),
        answer=str(results[-1]),
        facts={"task": task, "question": question, "steps": len(steps)},
    )


def _filled(arguments: Any, values: Values) -> Any:
    """Arguments with placeholders filled in, nested ones too."""
    if isinstance(arguments, str):
        return arguments.format(**values)
    return {name: _filled(inner, values) for name, inner in arguments.items()}
