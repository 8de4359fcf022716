"""The distillation loss beside a dense one: processor seconds and memory, by number of tokens.

    .venv/bin/python benchmarks/loss.py                     # minutes of one core, 8 GB at 4,096
    .venv/bin/python benchmarks/loss.py --tokens 512 1024 --rounds 5

    ours    modeling/losses.py: the teacher's top 64 and the tail, a frozen head, chunks of tokens
    dense   the teacher's whole distribution: logits, log_softmax, KL and CE over the vocabulary,
            and autograd; the head frozen as ours, or trained
    floor   the two products with the head that even a loss of no cost would need

Forward and backward on random numbers at SmolLM2's shape, in the type that the processor is fast
in, on one thread. Methods take turns, round by round; printed are the medians of their processor
seconds and of the ratios within a round. Memory is what a process of its own had at most above what
it held before the call, its inputs among that (VmHWM, reset through /proc/self/clear_refs, so on
Linux only).

Measured (AVX2, float32, 1,024 tokens, 3 rounds): ours 2.21 s, dense 1.88 times that, with a trained
head 2.27, the floor 0.85; 64 MB against 1,217.
"""

import argparse
import gc
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from modeling.backends import compute_dtype
from modeling.losses import SparseTargets, head_loss

WIDTH, VOCABULARY, TOP_K = 576, 49_152, 64
KD_WEIGHT, CE_WEIGHT = 1.0, 0.2
OURS, DENSE, TRAINED = "ours", "dense", "dense, trained head"
METHODS = (OURS, DENSE, TRAINED)
FLOOR = "floor"


def main() -> None:
    """Print one line a number of tokens."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tokens", type=int, nargs="+", default=[512, 1024, 2048, 4096], help="(512 to 4,096)")
    add("--rounds", type=int, default=5, help="(5)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{compute_dtype(torch.device('cpu'))}, vocabulary {VOCABULARY}, width {WIDTH}")
    print(f"{'tokens':>6}  processor seconds (times ours){'':31}  MB above the inputs (times ours)")
    print(" " * 6 + "".join(f"  {m:<20}" for m in (*METHODS, FLOOR)))
    for tokens in options.tokens:
        seconds = interleaved(tokens, options.rounds)
        memory = {method: apart(tokens, method) for method in METHODS}
        ratio = {m: median(map(float.__truediv__, seconds[m], seconds[OURS])) for m in seconds}
        times = [f"{median(seconds[m]):.2f} ({ratio[m]:.2f})" for m in (*METHODS, FLOOR)]
        room = [f"{memory[m] / 1e6:,.0f} ({memory[m] / memory[OURS]:.1f})" for m in METHODS]
        print(f"{tokens:>6}" + "".join(f"  {cell:<20}" for cell in times + room), flush=True)


def calls(tokens: int) -> dict[str, Callable[[], object]]:
    """One forward and backward of each method, on the same numbers."""
    dtype = compute_dtype(torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32)

    hidden = normal(tokens, WIDTH).to(dtype).requires_grad_()
    head = normal(VOCABULARY, WIDTH).mul_(0.1).to(dtype)
    trained = head.clone().requires_grad_()
    labels = torch.randint(VOCABULARY, (tokens,), generator=generator)
    teacher = normal(tokens, VOCABULARY).mul_(2).log_softmax(-1).to(dtype)
    top = teacher.float().topk(TOP_K)
    targets = SparseTargets(top.indices, top.values, 1 - top.values.exp().sum(-1))
    held = torch.empty(min(tokens, 512), VOCABULARY, dtype=dtype)

    def ours() -> None:
        hidden.grad = None
        head_loss(hidden, head, labels, targets, KD_WEIGHT, CE_WEIGHT, 1.0)[0].backward()

    def dense(matrix: Tensor) -> None:
        hidden.grad = matrix.grad = None
        logits = hidden @ matrix.T
        kl = kl_div(logits.log_softmax(-1), teacher, log_target=True, reduction="batchmean")
        (KD_WEIGHT * kl + CE_WEIGHT * cross_entropy(logits, labels)).backward()

    @torch.no_grad()
    def products() -> None:
        for part in hidden.split(len(held)):
            torch.mm(torch.mm(part, head.T, out=held[: len(part)]), head)

    return {
        OURS: ours,
        DENSE: lambda: dense(head),
        TRAINED: lambda: dense(trained),
        FLOOR: products,
    }


def interleaved(tokens: int, rounds: int) -> dict[str, list[float]]:
    """Processor seconds of each method, one a round, after one round that is not counted."""
    methods = calls(tokens)
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    for number in range(rounds + 1):
        for method, call in methods.items():
            began = time.process_time()
            call()
            if number:
                seconds[method].append(time.process_time() - began)
    return seconds


def apart(tokens: int, method: str) -> int:
    """Peak bytes of a method above its inputs, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(peak, tokens, method).result()


def peak(tokens: int, method: str) -> int:
    """The most that this process holds while it runs a method once, above what it held before."""
    torch.set_num_threads(1)
    call = calls(tokens)[method]
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = status("VmRSS")
    call()
    return status("VmHWM") - before


def status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


if __name__ == "__main__":
    main()
