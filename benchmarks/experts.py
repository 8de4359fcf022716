"""Experts read as they are routed to, beside blocks that are read whole: bytes and seconds.

    .venv/bin/python benchmarks/experts.py            # 2.2 GB in a temporary folder

A random Qwen3-MoE in bfloat16 (5 blocks, width 1024, 128 experts of width 512, 8 a token) takes one
batch of random tokens through all blocks and the head, once each way, interleaved, from a cold page
cache; medians. Its router is random, but states of an untrained model resemble each other, so it
uses fewer experts than independent choices would; a trained one may use more or fewer. Both ways
must give the same bits. "here" is what modeling/experts.py chooses by the expected share.
"""

import contextlib
import math
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from random_models import drop_pages, size_of
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from modeling.checkpoint import read_checkpoint
from modeling.experts import ROUTED_BELOW
from modeling.skeleton import build_skeleton
from modeling.streaming import Passage
from modeling.weights import Streamed

TOKENS, ROUNDS = (1, 4, 16, 64, 512), 3
CONFIG = Qwen3MoeConfig(
    hidden_size=1024, num_hidden_layers=5, num_attention_heads=16, num_key_value_heads=4,
    head_dim=64, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=512,
    intermediate_size=512, vocab_size=32000, dtype="bfloat16",
)  # fmt: skip


@torch.no_grad()
def passage(folder: Path, batch: torch.Tensor, routed: bool) -> tuple[float, int, torch.Tensor]:
    """Seconds from opening to the last piece of the head, bytes read, and what the head gets."""
    checkpoint = read_checkpoint(folder)
    drop_pages(folder)
    began = time.monotonic()
    skeleton = build_skeleton(Qwen3MoeForCausalLM, CONFIG, checkpoint, torch.bfloat16)
    weights = Streamed(skeleton, checkpoint, 1 if routed else math.inf)
    with contextlib.closing(weights):
        inputs = {"input_ids": batch, "use_cache": False}
        running = Passage(skeleton.model, skeleton.blocks, weights, [inputs])
        for _ in running.run():
            pass
        for _ in weights.head():
            pass
        return time.monotonic() - began, weights.reader.bytes_read, running.forwards[0].normed


def main() -> None:
    """Measure every number of tokens, and print a table."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="experts-") as scratch:
        folder = Path(scratch)
        torch.set_default_dtype(torch.bfloat16)
        Qwen3MoeForCausalLM(CONFIG).save_pretrained(folder)
        torch.set_default_dtype(torch.float32)
        print(f"{size_of(folder) / 1e9:.2f} GB; medians of {ROUNDS}; routed / whole")
        print("tokens  expected share   GB read         seconds       here")
        for tokens in TOKENS:
            batch = torch.randint(0, CONFIG.vocab_size, (1, tokens))
            ways = [[passage(folder, batch, way) for way in (True, False)] for _ in range(ROUNDS)]
            assert all(torch.equal(one[2], other[2]) for one, other in ways), "the bits differ"
            share = 1 - (1 - CONFIG.num_experts_per_tok / CONFIG.num_experts) ** tokens
            wall = [median(pair[way][0] for pair in ways) for way in (0, 1)]
            read = [ways[0][way][1] / 1e9 for way in (0, 1)]
            here = "routed" if share < ROUTED_BELOW else "whole"
            print(
                f"{tokens:6}  {share:14.0%}  {read[0]:5.2f} / {read[1]:5.2f}  "
                f"{wall[0]:5.2f} / {wall[1]:5.2f}  {here}"
            )


if __name__ == "__main__":
    main()
