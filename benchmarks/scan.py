"""What a training step of Mamba costs on a CPU, by each way to scan.

    .venv/bin/python benchmarks/scan.py --tokens 128 256 512 --repeats 5

transformers' own loop, `fast_scan` (modeling/scan.py), the whole `fast_path` that stages train with
(RMSNorm, too), and mambapy's parallel scan where that package can be imported (it is no part of the
project: pip install --no-deps --target FOLDER mambapy, then PYTHONPATH=FOLDER). Blocks of
mamba-130m's sizes with random weights and a small vocabulary. The ways take turns; figures are
CPU-seconds of one thread, medians; ratios are medians of each round's.
"""

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from statistics import median

import torch
from torch import Tensor
from transformers import MambaConfig, MambaForCausalLM, PreTrainedModel

from modeling.fast_path import fast_path
from modeling.scan import fast_scan

VOCABULARY = 1000


def build(width: int, blocks: int) -> PreTrainedModel:
    """Random Mamba blocks; the same each time."""
    torch.manual_seed(0)
    config = MambaConfig(hidden_size=width, num_hidden_layers=blocks, vocab_size=VOCABULARY)
    return MambaForCausalLM(config)


def step(model: PreTrainedModel, ids: Tensor, way: Callable) -> tuple[float, float, Tensor]:
    """CPU-seconds of a forward pass, and with the backward pass; the gradients in one vector."""
    model.zero_grad()
    start = time.process_time()
    with way(model):
        loss = model(ids, labels=ids, use_cache=False).loss
    forward = time.process_time() - start
    loss.backward()
    total = time.process_time() - start
    return forward, total, torch.cat([p.grad.flatten() for p in model.parameters()])


def compare(models: dict[str, tuple[PreTrainedModel, Callable]], ids: Tensor, rounds: int) -> None:
    """Let the ways take turns, and print a line each."""
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    gradients: dict[str, Tensor] = {}
    for number in range(rounds + 1):  # the first one warms up
        for name, (model, way) in models.items():
            forward, total, gradients[name] = step(model, ids, way)
            if number:
                seen[name].append((forward, total))
    reference = "transformers"
    for name, times in seen.items():
        ratio = median(a[1] / b[1] for a, b in zip(seen[reference], times, strict=True))
        difference = (gradients[name] - gradients[reference]).norm() / gradients[reference].norm()
        forward, total = (median(column) for column in zip(*times, strict=True))
        print(
            f"{ids.shape[0]:>3} x {ids.shape[1]:<6}{name:<14}{forward:>8.3f} s{total:>10.3f} s"
            f"{ids.numel() / total:>10.0f}{ratio:>9.1f}x{difference.item():>14.1e}", flush=True,
        )  # fmt: skip


def main(arguments: list[str]) -> int:
    """Compare at each length."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 256, 512], help="a row")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    model = build(options.width, options.blocks)
    models: dict[str, tuple[PreTrainedModel, Callable]] = {
        "transformers": (model, nullcontext),
        "fast_scan": (model, fast_scan),
        "fast_path": (model, lambda one: fast_path(one, say=lambda _: None)),
    }
    if importlib.util.find_spec("mambapy"):
        other = build(options.width, options.blocks)
        for block in other.backbone.layers:
            block.mixer.use_mambapy = True
        models["mambapy"] = (other, nullcontext)
    print(f"{options.blocks} blocks of width {options.width}, {VOCABULARY} tokens of vocabulary")
    print("rows x tokens way            forward  with backward  tokens/s   times  gradient differs")
    for tokens in options.tokens:
        ids = torch.randint(0, VOCABULARY, (options.rows, tokens))
        compare(models, ids, options.repeats)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
