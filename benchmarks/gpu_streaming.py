"""Streaming to a GPU that the model does not fit: is the GPU busy, or else the bus?

    .venv/bin/python benchmarks/gpu_streaming.py --folder /data/models [--size 3b] [--cap-gib 2]

A random Llama goes through a GPU of which this process may use --cap-gib alone, less than the model
takes. Beside it, in the same process and interleaved: the same batches with all weights on the GPU,
which is the floor for compute, and the bus's own bandwidth for pinned memory, the floor for weights
that come out of the page cache. Printed: wall seconds, the share of them that the GPU computes, and
the share of the bus's bandwidth that is used. Needs a CUDA GPU; says so and ends with 0 without.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
from random_models import SHAPES, checkpoint, size_of
from torch import Tensor

from modeling.blocks import find_units
from modeling.loading import open_model
from modeling.streaming import Passage
from modeling.teacher import Teacher, open_teacher
from modeling.weights import Resident

GIB = 1 << 30


def main() -> None:
    """Measure a few and many tokens."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, help="where the checkpoint is kept (a temporary one)"
    )
    parser.add_argument("--size", choices=SHAPES, default="3b")
    parser.add_argument(
        "--cap-gib", type=float, default=2.0, help="of GPU memory for streaming (2)"
    )
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("skipped: there is no CUDA GPU")
        return
    with tempfile.TemporaryDirectory() as scratch:
        model = checkpoint(options.folder or Path(scratch), options.size)
        bus = bus_bandwidth()
        print(f"{torch.cuda.get_device_name()}: pinned memory arrives with {bus / 1e9:.1f} GB/s")
        for rows, length in ((1, 512), (4, 2048), (32, 2048)):
            measure(options, model, rows, length, bus)
    sys.stdout.flush()


def measure(options: argparse.Namespace, model: Path, rows: int, length: int, bus: float) -> None:
    """Stream and compute the same tokens in turns; print medians."""
    vocabulary = SHAPES[options.size].vocabulary
    tokens = torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))
    batches = tokens.split(4)
    streamed, computed, peaks = [], [], []
    for _ in range(options.rounds):
        seconds, peak = stream(options, model, batches, tokens.numel())
        streamed.append(seconds)
        peaks.append(peak)
        computed.append(compute(model, batches))
    wall, floor, size = median(streamed), median(computed), size_of(model)
    print(
        f"{options.size} ({size / 1e9:.1f} GB), {tokens.numel()} tokens, "
        f"cap {options.cap_gib} GiB, peak {max(peaks) / GIB:.2f} GiB: {wall:.2f} s, "
        f"{floor:.2f} s of them computing ({floor / wall:.0%} busy); "
        f"bus {size / wall / 1e9:.1f} GB/s ({size / wall / bus:.0%}); "
        f"x {wall / max(floor, size / bus):.2f} of the floor"
    )


def stream(
    options: argparse.Namespace, model: Path, batches: Sequence[Tensor], tokens: int
) -> tuple[float, int]:
    """Seconds and peak bytes of a passage whose weights come by the bus; opening is not counted."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(options.cap_gib * GIB / total)
    torch.cuda.reset_peak_memory_stats()
    teacher = open_teacher(model, "streamed", batches[0].numel(), tokens, torch.device("cuda"))
    seconds = run(teacher, batches)
    teacher.close()
    peak = torch.cuda.max_memory_reserved()
    del teacher
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.0)
    return seconds, peak


def compute(model: Path, batches: Sequence[Tensor]) -> float:
    """Seconds of the same passage with all weights on the GPU."""
    whole = open_model(model, torch.device("cuda"))
    teacher = Teacher(whole, find_units(whole), Resident(whole), None, torch.device("cuda"))
    run(teacher, [batches[0]])  # warm up
    return run(teacher, batches)


def run(teacher: Teacher, batches: Sequence[Tensor]) -> float:
    """Seconds of a passage up to the head."""
    passage: Passage = teacher.passage(batches)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in passage.run():
        pass
    torch.cuda.synchronize()
    return time.perf_counter() - began


def bus_bandwidth() -> float:
    """Bytes a second from pinned memory to the GPU, the best of 5 copies of 1 GiB."""
    host = torch.empty(GIB, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(GIB, dtype=torch.uint8, device="cuda")
    best = 0.0
    for _ in range(5):
        torch.cuda.synchronize()
        began = time.perf_counter()
        there.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        best = max(best, GIB / (time.perf_counter() - began))
    return best


if __name__ == "__main__":
    main()
