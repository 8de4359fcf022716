"""Two skills in sequence, in every way there is to keep the first one; what it keeps and costs.

Used by retention.py, with networks that are trained from nothing, and by specialists.py, with
SmolLM2; the ways are told in the former.
"""

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from math import exp
from statistics import mean

import torch
from torch import Tensor, nn

from modeling.blocks import dissect
from modeling.losses import SparseTargets, head_loss
from modeling.protection import Bases, InputMoments, extend_all, linear_layers, protected_share
from stages.distill.retention import Retention
from stages.learning.training import TrainState

BATCH_ROWS, TOP_K, CLIP, WARMUP = 8, 32, 1.0, 0.05
WAYS = ("replayed", "subspaces", "both", "mixed")

Named = list[tuple[str, nn.Parameter]]


@dataclass(frozen=True)
class Skill:
    """One teacher's rows (N, T), the held-out ones (M, T), and its answers to the former."""

    name: str
    rows: Tensor
    heldout: Tensor
    answers: SparseTargets | None = None


def teach_all(student, skills: list[Skill], seed: int, options) -> dict[str, Retention]:
    """Every way; all but `mixed` go on from the same student, whom the first teacher taught."""
    names, steps, rate = tuple(skill.name for skill in skills), options.steps, options.learning_rate
    first = copy.deepcopy(student)
    learn_answers(first, skills[:1], steps, seed, rate, prefix=options.prefix)
    shielded = {"subspaces", "both"} & set(options.ways)
    bases = used_subspaces(first, skills[0].rows[:512], options) if shielded else {}
    rows = round(options.replay_share * BATCH_ROWS)
    ways = {
        "plain": (first, skills[1:], {}, 0),
        "replayed": (first, skills[1:], {}, rows),
        "subspaces": (first, skills[1:], bases, 0),
        "both": (first, skills[1:], bases, rows),
        "mixed": (student, skills, {}, 0),
    }
    found = {}
    for way in ("plain", *options.ways):
        start, lessons, protecting, repeated = ways[way]
        model, count = copy.deepcopy(start), len(lessons) * steps
        again = (skills[0], repeated)
        learn_answers(model, lessons, count, seed + 1, rate, protecting, again, options.prefix)
        columns = [losses(start, skills), losses(model, skills)]
        after = names if start is first else ("none", "both")
        found[way] = Retention(names, after, tuple(zip(*columns, strict=True)))
    return found


def used_subspaces(model, rows: Tensor, options) -> Bases:
    """The inputs on some rows, of each linear layer that is trained."""
    trained = dict(behind(model, options.prefix))
    layers = linear_layers(dissect(model).blocks, "blocks")
    moments = InputMoments({n: m for n, m in layers.items() if f"{n}.weight" in trained})
    with moments.watching(), torch.no_grad():
        for part in rows.split(64):
            model(part, use_cache=False, logits_to_keep=1)
    bases = extend_all({}, moments, options.share, model.config.hidden_size * 8)
    print(f"protected: {protected_share(bases):.1%} of the input directions")
    return bases


def learn_answers(
    model,
    skills: list[Skill],
    steps: int,
    seed: int,
    rate: float,
    bases: Bases | None = None,
    again: tuple[Skill | None, int] = (None, 0),
    prefix: int = 0,
) -> None:
    """Train a student's blocks behind a prefix on the teachers' answers, theirs in turn.

    Head and embedding stay. With bases, only the weights that they protect are trained, and norms
    are not.
    again: a skill, and how many of its rows are repeated beside each batch.
    """
    named = behind(model, prefix)
    named = [(n, p) for n, p in named if not bases or n.removesuffix(".weight") in bases]
    state = TrainState(named, rate, steps, bases)
    draws = [picks(len(skill.rows), seed + 100 * place) for place, skill in enumerate(skills)]
    earlier, rows = again
    repeats = picks(len(earlier.rows), seed + 500, rows) if rows else None
    for step in range(steps):
        place = step % len(skills)
        answer_loss(model, skills[place], next(draws[place])).backward()
        if rows:
            (answer_loss(model, earlier, next(repeats)) * (rows / BATCH_ROWS)).backward()
        state.update(WARMUP, CLIP)
    model.requires_grad_(False)


def answer_loss(model, skill: Skill, batch: Tensor) -> Tensor:
    """The loss of some of a skill's rows, as in `distill`."""
    hidden = model.model(skill.rows[batch], use_cache=False).last_hidden_state[:, :-1]
    targets = skill.answers[batch].each(lambda tensor: tensor[:, :-1].flatten(0, 1))
    labels, head = skill.rows[batch][:, 1:].flatten(), dissect(model).head.weight
    return head_loss(hidden.flatten(0, 1), head, labels, targets, 1.0, 0.2, 1.0)[0]


def behind(model, prefix: int) -> Named:
    """The parameters of the blocks behind a prefix, and of the final norm."""
    anatomy = dissect(model)
    blocks = [(f"blocks.{name}", p) for name, p in anatomy.blocks.named_parameters()]
    named = [(name, p) for name, p in blocks if int(name.split(".")[1]) >= prefix]
    return named + [(f"norm.{name}", p) for name, p in anatomy.norm.named_parameters()]


def learn_text(model, named: Named, rows: Tensor, steps: int, seed: int, rate: float) -> None:
    """Train some parameters of a model on text; the others stay."""
    model.requires_grad_(False)
    state = TrainState(named, rate, steps)
    for batch in itertools.islice(picks(len(rows), seed), steps):
        model(rows[batch], labels=rows[batch], use_cache=False).loss.backward()
        state.update(WARMUP, CLIP)
    model.requires_grad_(False)


def picks(count: int, seed: int, rows: int = BATCH_ROWS) -> Iterator[Tensor]:
    """Endless batches of row numbers."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).split(rows)


@torch.no_grad()
def answer(teacher, rows: Tensor) -> SparseTargets:
    """The teacher's top tokens at every position, as `extract` stores them."""
    kept = []
    for part in rows.split(64):
        log_probs, ids = teacher(part, use_cache=False).logits.log_softmax(-1).topk(TOP_K)
        kept.append((ids, log_probs, 1 - log_probs.exp().sum(-1)))
    return SparseTargets(*(torch.cat(column) for column in zip(*kept, strict=True)))


@torch.no_grad()
def cross_entropy(model, rows: Tensor) -> float:
    """Nats a token."""
    return model(rows, labels=rows, use_cache=False).loss.item()


def losses(model, skills: list[Skill]) -> list[float]:
    """Held-out cross-entropy by skill."""
    return [cross_entropy(model, skill.heldout) for skill in skills]


def report(title: str, outcomes: list[dict[str, Retention]]) -> None:
    """Print the mean matrix of each way, and the two figures of the bar."""
    print(f"\n{title}")
    averaged = {}
    for way, one in outcomes[0].items():
        stacked = [outcome[way].losses for outcome in outcomes]
        means = tuple(
            tuple(map(mean, zip(*rows, strict=True))) for rows in zip(*stacked, strict=True)
        )
        averaged[way] = Retention(one.skills, one.after, means)
        print(f"{way}\n{averaged[way].table()}")
    first, second = averaged["plain"].skills
    for way in averaged:
        rows = [outcome[way].losses for outcome in outcomes]
        kept = [exp(min(own) - own[-1]) for own, _ in rows]
        line = f"{way:<10} keeps of {first} {spread(kept)}"
        if way != "plain":
            base = [outcome["plain"].losses[1][-1] for outcome in outcomes]
            cost = [exp(own[-1] - plain) - 1 for (_, own), plain in zip(rows, base, strict=True)]
            line += f"; costs {second} {spread(cost)}"
        print(line)
    print(flush=True)


def spread(shares: list[float]) -> str:
    """Mean, least and largest, in percent."""
    return f"{mean(shares):.1%} ({min(shares):.1%} to {max(shares):.1%})"
