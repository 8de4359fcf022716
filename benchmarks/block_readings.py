"""What a scan of a model's structural blocks costs beside a plain forward and backward pass.

    .venv/bin/python benchmarks/block_readings.py [MODEL] [--rows 2] [--tokens 256] [--rounds 5]

MODEL: a name in registry/teachers.yaml or a folder (smollm2-135m). On the same tokens:

    weights   forward and backward as in training: gradients of all weights
    plain     the same with frozen weights: gradients flow to activations alone
    scan      that, with readings of all heads and groups of 64 neurons, and their statistics

Time: rounds in which the three take turns, in processor seconds of one thread; printed are medians
and the median of each round's ratio to plain. Memory: the most that a process of its own has in a
second pass (VmHWM), above what it had before it.

Bar: 1.15 times plain's time, 1.10 times its memory. Measured (SmolLM2, AVX2, float32, one thread):

    way       core-seconds  to plain   MiB    to plain
    weights   6.69          1.338      1,111  1.773
    plain     4.87          1.000      627    1.000
    scan      5.00          1.043      624    0.996
"""

import argparse
import ctypes
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch

from modeling.block_readings import frozen, read_blocks, summed_loss
from modeling.block_scores import BlockStatistics
from modeling.block_sites import find_sites
from modeling.loading import locate, open_model
from stages.process import peak_memory_bytes

WAYS = ("weights", "plain", "scan")
PROJECT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Print a line a way."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", nargs="?", default="smollm2-135m")
    add("--rows", type=int, default=2)
    add("--tokens", type=int, default=256)
    add("--rounds", type=int, default=5)
    add("--way", choices=WAYS, help=argparse.SUPPRESS)  # this process measures its memory alone
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.way:
        once = passes_of(options)[options.way]
        once()  # what kernels keep is there from now on
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # and what the allocator kept is given back
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what there is
        before = peak_memory_bytes()
        once()
        print(json.dumps(peak_memory_bytes() - before))
        return
    seconds = take_turns(passes_of(options), options.rounds)
    memory = {way: memory_of(way) for way in WAYS}
    print("| way | core-seconds | to plain | MiB | to plain |\n|---|---|---|---|---|")
    for way in WAYS:
        ratio = median(a / b for a, b in zip(seconds[way], seconds["plain"], strict=True))
        print(
            f"| {way} | {median(seconds[way]):.2f} | {ratio:.3f} | {memory[way] / 2**20:.0f} "
            f"| {memory[way] / memory['plain']:.3f} |"
        )


def passes_of(options: argparse.Namespace) -> dict:
    """A function each way, which makes one pass."""
    model = open_model(locate(options.model)).eval()
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (options.rows, options.tokens), generator=generator)
    real = torch.ones_like(tokens, dtype=torch.bool)
    sites = find_sites(model)

    def weights() -> None:
        model.requires_grad_(True)
        summed_loss(model, tokens, real).backward()
        model.zero_grad()

    def plain() -> None:
        embedding = model.get_input_embeddings()
        hook = embedding.register_forward_hook(lambda _m, _i, out: out.requires_grad_(True))
        with frozen(model):
            summed_loss(model, tokens, real).backward()
        hook.remove()

    def scan() -> None:
        BlockStatistics(sites).add(read_blocks(model, tokens, sites, real)[1], real)

    return {"weights": weights, "plain": plain, "scan": scan}


def take_turns(passes: dict, rounds: int) -> dict[str, list[float]]:
    """Processor seconds of each way in each round, after one that warms up."""
    seconds: dict[str, list[float]] = {way: [] for way in passes}
    for turn in range(rounds + 1):
        for way, once in passes.items():
            began = time.process_time()
            once()
            if turn:
                seconds[way].append(time.process_time() - began)
    return seconds


def memory_of(way: str) -> int:
    """Bytes that one pass takes at the most, in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
