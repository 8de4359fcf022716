"""What ablation harm costs: by resuming behind the skipped block, and by a forward for each.

    .venv/bin/python benchmarks/ablation.py [--teacher smollm2-135m] [--rows 8] [--tokens 256]

A forward-equivalent is one forward of the same rows with logits and their comparison with the whole
model's, which is what each of the naive way's steps does. The floor is arithmetic: resuming saves
half of the block runs, but every changed model needs its own output head, whose share of a forward
is printed. Both ways give the same numbers, which is checked. Interleaved; medians of the rounds.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from modeling.answers import logits_of
from modeling.loading import locate
from modeling.streaming import Forward
from modeling.teacher import Teacher, open_teacher
from stages.process import keep_freed_memory, spin_briefly
from stages.profile.harm import Judge


def main() -> None:
    """Measure both ways and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--batch-rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    spin_briefly()
    keep_freed_memory()
    count = options.rows * options.tokens
    teacher = open_teacher(
        locate(options.teacher), "resident", options.batch_rows * options.tokens, count
    )
    generator = torch.Generator().manual_seed(0)
    vocabulary = teacher.model.config.get_text_config().vocab_size
    rows = torch.randint(vocabulary, (options.rows, options.tokens), generator=generator)
    batches = rows.split(options.batch_rows)
    ways: dict[str, Callable[[Teacher, tuple[Tensor, ...]], Tensor]] = {
        "one forward": whole,
        "its blocks alone": blocks_alone,
        "naive": naive,
        "resuming": resuming,
    }
    wall: dict[str, list[float]] = {name: [] for name in ways}
    processor: dict[str, list[float]] = {name: [] for name in ways}
    found = {}
    for way in ways.values():
        way(teacher, tuple(batch[:1, :32] for batch in batches))  # warm up
    for _ in range(options.rounds):
        for name, way in ways.items():
            began, used = time.perf_counter(), time.process_time()
            found[name] = way(teacher, batches)
            wall[name].append(time.perf_counter() - began)
            processor[name].append(time.process_time() - used)
    for what, seconds in (("wall", wall), ("processor", processor)):
        print(f"{what} seconds:")
        report(len(teacher.blocks), {name: median(values) for name, values in seconds.items()})
    apart = (found["naive"] - found["resuming"]).abs().max().item()
    print(f"harms differ by {apart:.2e} nats at most, of {found['naive'].max():.3f}")


def report(count: int, seconds: dict[str, float]) -> None:
    """Print what each way took, and what it could not do without."""
    unit = seconds["one forward"]
    share = 1 - seconds["its blocks alone"] / unit
    for name, taken in seconds.items():
        print(f"{name:<18}{taken:8.2f} s  {taken / unit:6.1f} forward-equivalents")
    floor = (count + 1) / 2 * (1 - share) + (count + 1) * share
    print(
        f"floor of resuming: {floor:.1f} = {(count + 1) / 2:.1f} of blocks and {count + 1} of "
        f"heads and comparisons, {share:.0%} of a forward each"
    )


@torch.no_grad()
def whole(teacher: Teacher, batches: tuple[Tensor, ...]) -> Tensor:
    """The whole model, compared with itself."""
    harms = []
    for batch in batches:
        passage = teacher.passage([batch])
        _exhaust(passage.run())
        forward = passage.forwards[0]
        harms.append(_judge_of(passage, forward).harm(forward))
    return torch.cat(harms)


@torch.no_grad()
def blocks_alone(teacher: Teacher, batches: tuple[Tensor, ...]) -> Tensor:
    """The whole model up to the head."""
    for batch in batches:
        _exhaust(teacher.passage([batch]).run())
    return torch.empty(0)


@torch.no_grad()
def naive(teacher: Teacher, batches: tuple[Tensor, ...]) -> Tensor:
    """A forward from the beginning for each block and batch, without that block: (L,) harms."""
    harms: list[list[Tensor]] = [[] for _ in teacher.blocks]
    for batch in batches:
        passage = teacher.passage([batch])
        _exhaust(passage.run())
        judge = _judge_of(passage, passage.forwards[0])
        for index, block in enumerate(teacher.blocks):
            original = block.forward
            block.forward = lambda hidden, *_, **__: hidden
            try:
                changed = teacher.passage([batch])
                _exhaust(changed.run())
            finally:
                block.forward = original
            harms[index].append(judge.harm(changed.forwards[0]))
    return torch.stack([torch.cat(values).mean() for values in harms])


@torch.no_grad()
def resuming(teacher: Teacher, batches: tuple[Tensor, ...]) -> Tensor:
    """One passage with a branch behind every block, as profile does it: (L,) harms."""
    passage = teacher.passage(batches)
    before: dict[int, Tensor] = {}
    branches: list[tuple[int, int]] = []
    for arrival in passage.run():
        if arrival.batch < len(batches):
            if arrival.block >= 0:
                passage.branch(arrival.batch, arrival.block, before[arrival.batch])
                branches.append((arrival.block, arrival.batch))
            before[arrival.batch] = arrival.hidden
    harms: list[list[Tensor]] = [[] for _ in teacher.blocks]
    for batch in range(len(batches)):
        judge = _judge_of(passage, passage.forwards[batch])
        changed = zip(branches, passage.forwards[len(batches) :], strict=True)
        for (block, origin), forward in changed:
            if origin == batch:
                harms[block].append(judge.harm(forward))
    return torch.stack([torch.cat(values).mean() for values in harms])


def _judge_of(passage, forward: Forward) -> Judge:
    return Judge(forward, logits_of(passage))


def _exhaust(arrivals) -> None:
    for _ in arrivals:
        pass


if __name__ == "__main__":
    main()
