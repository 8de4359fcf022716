"""What a second teacher costs the first one's skill: plain, protected and mixed.

    .venv/bin/python benchmarks/retention.py [--seeds 3] [--first arithmetic] [--share 0.99]

For each seed: a small Llama learns Python's documentation and worked arithmetic together; two
copies go on with one of them each and become the teachers; a student, the base less one block,
learns from their stored answers:

    plain       the first teacher's rows, then the second's
    protected   the same, but with the second's steps kept out of the input subspaces that the
                first skill uses (modeling/protection.py); norms stay as they are meanwhile
    mixed       both teachers' rows in turn, with as many steps as both together

All three have the same student, rows, steps and learning rate. Printed for each: the retention
matrix, held-out cross-entropy in nats a token and, in brackets, the perplexity at the skill's best
(over the columns) over that now. Then what is kept of the first skill after both, and what
protection costs the second against plain: as ratios of perplexities, the stricter, and of
cross-entropies.

Measured (arithmetic first, 3 seeds, share 0.99): plain keeps 10 % (7 to 13) of the first skill by
perplexity, 31 % by cross-entropy; protected 97 % by both. That costs the second 9.3 % (6.3 to 11.6)
of perplexity, 1.8 % (1.2 to 2.2) of cross-entropy; mixing 1.5 % of perplexity. A share of 0.95
keeps 93 % and costs 6 % (seed 0): in a network this narrow over half of the input directions are
taken at 0.99, and no share was found that keeps 95 % for 3 % of perplexity.

No model hub and no large model: the base has half a million parameters, trained from nothing
within this run. It shows the method, not how much of SmolLM2 it would keep.
"""

import argparse
import copy
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from math import exp
from statistics import mean

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from modeling.blocks import dissect, drop_blocks
from modeling.losses import SparseTargets, head_loss
from modeling.protection import Bases, InputMoments, extend_all, linear_layers, protected_share
from stages.distill.retention import Retention
from stages.prepare.arithmetic import training_problems
from stages.prepare.sources import python_docs
from stages.training import TrainState

VOCABULARY, ROW_TOKENS, BATCH_ROWS, TOP_K = 1024, 64, 8, 32
HELDOUT_ROWS, CLIP, WARMUP = 64, 1.0, 0.05
DROPPED = [2]


@dataclass(frozen=True)
class Skill:
    """One teacher's rows (N, T), the held-out ones (M, T), and its answers to the former."""

    name: str
    rows: Tensor
    heldout: Tensor
    answers: SparseTargets | None = None


def main() -> None:
    """Run all seeds and print the matrices."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--first", choices=("arithmetic", "docs"), default="arithmetic")
    parser.add_argument("--share", type=float, default=0.99, help="of the inputs' squares")
    parser.add_argument("--base-steps", type=int, default=250)
    parser.add_argument("--teacher-steps", type=int, default=100)
    parser.add_argument("--steps", type=int, default=120, help="a teacher")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    began = time.perf_counter()
    texts = read_texts()
    outcomes = []
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        outcomes.append(run_seed(texts, seed, options))
        report(f"seed {seed}", outcomes[-1:])
    if len(outcomes) > 1:
        report(f"mean of {options.seeds} seeds", outcomes)
    print(f"{time.perf_counter() - began:.0f} s")


def run_seed(texts: dict[str, Tensor], seed: int, options) -> dict[str, Retention]:
    """Base, teachers, then the student in each of the three ways."""
    torch.manual_seed(seed)
    order = sorted(texts, key=lambda name: name != options.first)
    generator = torch.Generator().manual_seed(seed)
    skills = []
    for name in order:
        shuffled = texts[name][torch.randperm(len(texts[name]), generator=generator)]
        skills.append(Skill(name, shuffled[HELDOUT_ROWS:], shuffled[:HELDOUT_ROWS]))
    base = new_model(options.width)
    learn_text(base, torch.cat([skill.rows for skill in skills]), options.base_steps, seed, 3e-3)
    for place, skill in enumerate(skills):
        teacher = copy.deepcopy(base)
        learn_text(teacher, skill.rows, options.teacher_steps, seed, 1e-3)
        loss = cross_entropy(teacher, skill.heldout)
        print(f"{skill.name}: base {cross_entropy(base, skill.heldout):.3f}, teacher {loss:.3f}")
        skills[place] = Skill(skill.name, skill.rows, skill.heldout, answer(teacher, skill.rows))
    student = copy.deepcopy(base)
    drop_blocks(student, DROPPED)
    student.requires_grad_(False)
    return teach_all(student, skills, seed, options)


def teach_all(student, skills: list[Skill], seed: int, options) -> dict[str, Retention]:
    """The three ways; the first teacher's lesson is the same in two of them and given once."""
    names, steps, rate = tuple(skill.name for skill in skills), options.steps, options.learning_rate
    first = copy.deepcopy(student)
    learn_answers(first, skills[:1], steps, seed, rate, {})
    layers = linear_layers(dissect(first).blocks, "blocks")
    moments = InputMoments(layers)
    with moments.watching(), torch.no_grad():
        for rows in skills[0].rows[:512].split(64):
            first(rows, use_cache=False, logits_to_keep=1)
    bases = extend_all({}, moments, options.share, options.width * 8)
    print(f"protected: {protected_share(bases):.1%} of the input directions")
    found = {}
    for way, protecting in (("plain", {}), ("protected", bases)):
        model = copy.deepcopy(first)
        learn_answers(model, skills[1:], steps, seed + 1, rate, protecting)
        columns = [losses(first, skills), losses(model, skills)]
        found[way] = Retention(names, names, tuple(zip(*columns, strict=True)))
    model = copy.deepcopy(student)
    learn_answers(model, skills, 2 * steps, seed, rate, {})
    columns = [losses(student, skills), losses(model, skills)]
    found["mixed"] = Retention(names, ("none", "both"), tuple(zip(*columns, strict=True)))
    return found


def learn_answers(
    model, skills: list[Skill], steps: int, seed: int, rate: float, bases: Bases
) -> None:
    """Train a student's blocks on the teachers' answers, theirs in turn; head and embedding stay.

    With bases, only the weights that they protect are trained, and norms are not.
    """
    anatomy = dissect(model)
    named = [(f"blocks.{name}", p) for name, p in anatomy.blocks.named_parameters()]
    named += [(f"norm.{name}", p) for name, p in anatomy.norm.named_parameters()]
    named = [(n, p) for n, p in named if not bases or n.removesuffix(".weight") in bases]
    state = TrainState(named, rate, steps, bases)
    draws = [picks(len(skill.rows), seed + 100 * place) for place, skill in enumerate(skills)]
    for step in range(steps):
        place = step % len(skills)
        skill, batch = skills[place], next(draws[place])
        hidden = model.model(skill.rows[batch], use_cache=False).last_hidden_state[:, :-1]
        targets = skill.answers[batch].each(lambda tensor: tensor[:, :-1].flatten(0, 1))
        labels = skill.rows[batch][:, 1:].flatten()
        loss, _, _ = head_loss(
            hidden.flatten(0, 1), anatomy.head.weight, labels, targets, 1.0, 0.2, 1.0
        )
        loss.backward()
        state.update(WARMUP, CLIP)
    model.requires_grad_(False)


def learn_text(model, rows: Tensor, steps: int, seed: int, rate: float) -> None:
    """Train all of a model on text."""
    model.requires_grad_(True)
    unique = {id(p): (n, p) for n, p in model.named_parameters()}
    state = TrainState(unique.values(), rate, steps)
    for batch in itertools.islice(picks(len(rows), seed), steps):
        model(rows[batch], labels=rows[batch], use_cache=False).loss.backward()
        state.update(WARMUP, CLIP)
    model.requires_grad_(False)


def picks(count: int, seed: int) -> Iterator[Tensor]:
    """Endless batches of row numbers."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).split(BATCH_ROWS)


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


def new_model(width: int):
    """A Llama of four blocks with tied embeddings."""
    config = LlamaConfig(
        hidden_size=width, intermediate_size=width * 8 // 3, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, vocab_size=VOCABULARY,
        max_position_embeddings=ROW_TOKENS, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).float()


def read_texts() -> dict[str, Tensor]:
    """Rows (N, ROW_TOKENS) of both skills, in one byte-level BPE trained on both."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    texts = {
        "docs": [text for _, text in itertools.islice(python_docs(0), 70)],
        "arithmetic": [text for _, text in itertools.islice(training_problems(0), 3000)],
    }
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<eos>"], initial_alphabet=alphabet,
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts["docs"] + texts["arithmetic"][:500], trainer)
    rows = {}
    for name, documents in texts.items():
        ids = [i for coded in tokenizer.encode_batch(documents) for i in (*coded.ids, 0)]
        count = min(len(ids) // ROW_TOKENS, 2000)
        rows[name] = torch.tensor(ids[: count * ROW_TOKENS]).view(count, ROW_TOKENS)
        print(f"{name}: {count} rows of {ROW_TOKENS} tokens")
    return rows


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
    for way in ("plain", "protected"):
        rows = [outcome[way].losses[0] for outcome in outcomes]
        kept = {
            "perplexity": [exp(min(row) - row[-1]) for row in rows],
            "cross-entropy": [min(row) / row[-1] for row in rows],
        }
        print(f"{way:<10} keeps of {first}, by {spread(kept)}")
    for way in ("protected", "mixed"):
        pairs = [(o[way].losses[1][-1], o["plain"].losses[1][-1]) for o in outcomes]
        cost = {
            "perplexity": [exp(loss - plain) - 1 for loss, plain in pairs],
            "cross-entropy": [loss / plain - 1 for loss, plain in pairs],
        }
        print(f"{way:<10} costs {second}, by {spread(cost)}")
    print(flush=True)


def spread(shares: dict[str, list[float]]) -> str:
    """Mean, least and largest of each, in percent."""
    return "; by ".join(
        f"{name} {mean(values):.1%} ({min(values):.1%} to {max(values):.1%})"
        for name, values in shares.items()
    )


if __name__ == "__main__":
    main()
