"""The memory planner's prediction beside the peak of processes that really serve a student.

    .venv/bin/python benchmarks/serving_memory.py artifacts/distill/student      # 9 cases
    .venv/bin/python benchmarks/serving_memory.py STUDENT --adapters 8 --contexts 2048 --rows 1

Each case is a process of its own. It imports what serves, plans (modeling/serving_memory.py, from
headers alone), and only then opens the model, puts adapters (random numbers, every linear layer of
every block, rank 16) into a bank, packs the weights, reads a prompt a row and decodes to the end of
the context with runtime.generation's Engine, each row with an adapter, all of which are used where
there are rows for it. Printed are the prediction, the most resident memory
that the system saw (VmHWM), and their ratio; the last line is the case that is furthest off.

Measured (AVX2, float32, one thread, a SmolLM2 of 24 blocks, 2 rows), predicted / measured, MiB:

    adapters       256 tokens            1,024                 2,048
    1              1,325 / 1,293 1.025   1,450 / 1,479 0.981   1,618 / 1,664 0.972
    4              1,369 / 1,329 1.031   1,495 / 1,525 0.981   1,663 / 1,706 0.975
    8              1,429 / 1,396 1.024   1,555 / 1,562 0.995   1,722 / 1,735 0.993

With 8 rows of 256 tokens, an adapter of its own each: 1,560 / 1,557.

On a GPU (--device cuda) it is the memory that torch gave out at the most there; where there is
none, the benchmark says so and ends.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from modeling.backends import compute_dtype
from modeling.checkpoint import read_checkpoint
from modeling.loading import open_model, open_tokenizer
from modeling.served_sizes import IN_BLOCK
from modeling.serving_memory import serving_need
from runtime.adapters.bank import AdapterBank
from runtime.generation.answers import Sampling
from runtime.generation.engine import Engine
from runtime.generation.products import packing_for

PROJECT = Path(__file__).resolve().parent.parent
RANK, ANSWER_TOKENS, MIB = 16, 16, 1 << 20


def main() -> None:
    """Print a line for each case, and the worst."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folder", type=Path, help="a model's folder")
    add("--adapters", type=int, nargs="*", default=[1, 4, 8], help="how many are held (1 4 8)")
    add("--contexts", type=int, nargs="*", default=[256, 1024, 2048], help="tokens of a row")
    add("--rows", type=int, default=2, help="rows at once (2)")
    add("--device", default="cpu", help="cpu or cuda (cpu)")
    add("--case", type=Path, nargs="*", help=argparse.SUPPRESS)  # this process is a case's own
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("skipped: torch sees no GPU here")
        return
    if options.case is not None:
        serve(options)
        return
    with tempfile.TemporaryDirectory() as scratch:
        made = [Path(scratch) / f"adapter-{n}" for n in range(max(options.adapters, default=0))]
        for seed, adapter in enumerate(made):
            make_adapter(options.folder, adapter, seed)
        compare(options, made)


def compare(options: argparse.Namespace, made: list[Path]) -> None:
    """Run the cases one after the other."""
    print(f"{options.rows} rows, {ANSWER_TOKENS} answer tokens, rank {RANK}, {options.device}; MiB")
    print(f"{'adapters':>8}{'context':>9}{'predicted':>11}{'measured':>10}{'ratio':>8}")
    ratios = []
    for context in options.contexts:
        for count in options.adapters:
            command = [sys.executable, __file__, str(options.folder), "--contexts", str(context)]
            command += ["--rows", str(options.rows), "--device", options.device]
            command += ["--case", *map(str, made[:count])]
            done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"the case of {count} adapters ended badly:\n{done.stderr}")
            found = json.loads(done.stdout.splitlines()[-1])
            ratios.append(found["predicted"] / found["measured"])
            sizes = f"{found['predicted'] / MIB:>11.0f}{found['measured'] / MIB:>10.0f}"
            print(f"{count:>8}{context:>9}{sizes}{ratios[-1]:>8.3f}", flush=True)
    print(f"furthest off: {max(ratios, key=lambda ratio: abs(ratio - 1)):.3f}")


def make_adapter(folder: Path, adapter: Path, seed: int) -> None:
    """Write a LoRA of random numbers for every linear layer of a model's blocks."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, place in read_checkpoint(folder).tensors.items():
        if IN_BLOCK.match(name):
            layer = f"base_model.model.{name.removesuffix('.weight')}"
            outputs, inputs = place.shape
            tensors[f"{layer}.lora_A.weight"] = torch.randn(RANK, inputs, generator=generator)
            tensors[f"{layer}.lora_B.weight"] = torch.randn(outputs, RANK, generator=generator)
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK}
    (adapter / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def serve(options: argparse.Namespace) -> None:
    """A case: plan, load, serve, and print the predicted and the measured peak in bytes."""
    torch.set_num_threads(1)
    device, (context,) = torch.device(options.device), options.contexts
    dtype = compute_dtype(device)
    need = serving_need(
        options.folder, dtype, context=context, answer_tokens=ANSWER_TOKENS, rows=options.rows,
        adapters=options.case, device=options.device,
        packing=packing_for(dtype, half_weights=True) if device.type == "cpu" else None,
    )  # fmt: skip
    model, tokenizer = open_model(options.folder, device), open_tokenizer(options.folder)
    model.generation_config.eos_token_id = tokenizer.eos_token = None
    bank = AdapterBank(model, budget_bytes=max(1, need.adapted))
    for adapter in options.case:
        bank.add(adapter.name, adapter)
    names = [adapter.name for adapter in options.case] or [None]
    engine = Engine(model, tokenizer, bank=bank)
    prompt = [3 + n % 1000 for n in range(context - ANSWER_TOKENS)]
    prompts = [prompt[row:] + prompt[:row] for row in range(options.rows)]
    mixed = [names[row % len(names)] for row in range(options.rows)]
    engine.answer(prompts, 1, Sampling(1.0, 1.0, ANSWER_TOKENS, max_calls=0, seed=0), mixed)
    print(need.table(), engine.path, sep="\n", file=sys.stderr)
    print(json.dumps({"predicted": need.total, "measured": peak_bytes(device)}))


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process ever had; getrusage would give its parent's, too."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
