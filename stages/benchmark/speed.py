"""Speed and memory of a model: these numbers differ from run to run.

python -m stages.benchmark.speed FOLDER    print the peak memory of opening and using a model
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modeling.loading import open_model
from stages.process import peak_memory_bytes

PROMPT_TOKENS = 64
NEW_TOKENS = 24


def time_models(models: dict[str, PreTrainedModel], rows: Tensor, rounds: int) -> dict[str, dict]:
    """Median tokens a second of each model, forward and greedy decoding, in alternating rounds."""
    timings: dict[str, dict[str, list[float]]] = {
        name: {"forward": [], "decode": []} for name in models
    }
    for model in models.values():
        forward_rate(model, rows)  # warm up
    for _ in range(rounds):
        for name, model in models.items():
            timings[name]["forward"].append(forward_rate(model, rows))
            timings[name]["decode"].append(decode_rate(model, rows))
    return {
        name: {f"{kind}_tokens_per_s": statistics.median(values) for kind, values in kinds.items()}
        for name, kinds in timings.items()
    }


@torch.no_grad()
def forward_rate(model: PreTrainedModel, rows: Tensor) -> float:
    """Tokens a second of one forward over rows (B, T)."""
    began = time.perf_counter()
    model(rows, use_cache=False, logits_to_keep=1)
    return rows.numel() / (time.perf_counter() - began)


@torch.no_grad()
def decode_rate(model: PreTrainedModel, rows: Tensor) -> float:
    """Tokens a second of greedy decoding, one sequence."""
    prompt = rows[:1, :PROMPT_TOKENS]
    fixed = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    began = time.perf_counter()
    model.generate(prompt, attention_mask=torch.ones_like(prompt), **fixed)
    return NEW_TOKENS / (time.perf_counter() - began)


def peak_memory_gib(folder: Path) -> float:
    """Peak resident memory of a process of its own that opens the model and decodes a little."""
    command = [sys.executable, "-m", "stages.benchmark.speed", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])["peak_memory_gib"]


def main(folder: Path) -> None:
    """Open, use once, and print the peak of resident memory above that of the imports alone."""
    before = peak_memory_bytes()
    decode_rate(open_model(folder), torch.ones(1, PROMPT_TOKENS, dtype=torch.long))
    print(json.dumps({"peak_memory_gib": round((peak_memory_bytes() - before) / 2**30, 3)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
