"""Tokens of the engine beside transformers' `generate` and TRL's GRPOTrainer: processor seconds.

    .venv/bin/python benchmarks/generation.py                             # a quarter of an hour
    .venv/bin/python benchmarks/generation.py --groups 4x4 --rounds 1
    python -m venv TRL && TRL/bin/pip install trl==1.16.0 ...   # and .venv's torch, transformers
    .venv/bin/python benchmarks/generation.py --trl-python TRL/bin/python

    ours, float16   runtime/generation with half_weights, as it is used
    ours, exact     the same from float32 weights
    generate        transformers, prompts padded on the left, a row a candidate, sampled the same
    TRL             what GRPOTrainer calls for its rollouts (no vLLM), and nothing else of its step

SmolLM2-135M, prompts of about 100 tokens, 48 new ones each, temperature 1, no end token, one
thread, in the type that the processor is fast in. The weights get noise of 0.1 %, because those of
the released file are float16 numbers, which would hide what rounding does. Methods take turns;
printed are medians of processor seconds a token and of the ratio round by round. Times are of a
whole call, reading of prompts included; `refresh` is what a GRPO step adds after its update. Not
counted: that rows which end early are dropped by ours and go on as padding with the others, and
that TRL reads adapters unmerged and needs another forward for its log-probabilities.

floor: the larger of two times, what reading the weights once a step takes at the measured speed of
memory, and what the products take at the measured speed of a large one; prompts once a group.

Measured (AVX2, float32, one core shared with other work, 4 x 4, 2 rounds): ours 11.6 ms a token,
exact 15.3, generate 27.8, TRL 27.0; the floor 5.0. So ours takes 1 / 2.4 of the processor time of
generate, exact 1 / 1.8. Reading of weights back into packed ones: 2.4 s as float16, 0.5 exact.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modeling.loading import locate, open_model, open_tokenizer
from runtime.generation.answers import Sampling
from runtime.generation.engine import Engine

PROJECT = Path(__file__).resolve().parent.parent
NEW, NOISE = 48, 1e-3
HALF, EXACT, GENERATE, TRL = "ours, float16", "ours, exact", "generate", "TRL"
SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_own_tokens=NEW, max_calls=0, seed=0)


def main() -> None:
    """Print a table for each number of groups."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--groups", nargs="*", default=["4x4", "8x8"], help="prompts x candidates (4x4 8x8)")
    add("--rounds", type=int, default=3, help="calls of each that count (3)")
    add("--trl-python", help="a Python that has trl and this project's packages")
    add("--side", type=Path, help=argparse.SUPPRESS)  # TRL's, with this model
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.side:
        serve_trl(options.side)
        return
    folder = Path(locate("smollm2-135m").path)
    model, tokenizer = noisy_model(folder), open_tokenizer(folder)
    tokenizer.eos_token = None
    engines = {
        HALF: Engine(model, tokenizer),
        EXACT: Engine(model, tokenizer, half_weights=False),
    }
    for name, engine in engines.items():
        print(f"{name}: {engine.path}; refresh {timed(engine.refresh):.2f} s")
    side = start_side(options.trl_python, folder) if options.trl_python else None
    for groups in options.groups:
        prompts, candidates = map(int, groups.split("x"))
        compare(model, engines, side, rows_of(prompts, folder), candidates, options.rounds)
    report_differences(model, engines, rows_of(4, folder))
    if side is not None:
        side.stdin.close()
        side.wait()


def noisy_model(folder: Path) -> PreTrainedModel:
    """The model, with weights that are no float16 numbers, and no token that ends a text."""
    model = open_model(folder)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        parameter.data.addcmul_(parameter.data, noise, value=NOISE)
    model.generation_config.eos_token_id = None
    return model


def rows_of(prompts: int, folder: Path) -> list[list[int]]:
    """Prompts of 93 to 107 tokens of English."""
    words = open_tokenizer(folder).encode(__doc__ * 4)
    return [words[5 * n : 5 * n + 93 + 14 * n // max(1, prompts - 1)] for n in range(prompts)]


def compare(
    model: PreTrainedModel,
    engines: dict[str, Engine],
    side: subprocess.Popen | None,
    prompts: list[list[int]],
    candidates: int,
    rounds: int,
) -> None:
    """Let the methods take turns, and print what a token took of each."""
    methods: dict[str, Callable[[], float]] = {
        name: lambda engine=engine: timed(lambda: engine.answer(prompts, candidates, SAMPLING))
        for name, engine in engines.items()
    }
    methods[GENERATE] = lambda: timed(lambda: generate(model, prompts, candidates))
    if side is not None:
        methods[TRL] = lambda: float(ask(side, f"{len(prompts)} {candidates}"))
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds):
        for name, method in methods.items():
            seconds[name].append(method())
    tokens = len(prompts) * candidates * NEW
    floor = floor_seconds(model, prompts, candidates)
    print(f"\n{len(prompts)} x {candidates}, {tokens} tokens; floor {1e3 * floor / tokens:.2f} ms")
    print(f"{'':<15}{'ms a token':>12}{'/ floor':>9}{'generate / this':>17}")
    for name, taken in seconds.items():
        ratio = median(g / t for g, t in zip(seconds[GENERATE], taken, strict=True))
        own = median(taken)
        print(f"{name:<15}{1e3 * own / tokens:>12.2f}{own / floor:>9.2f}{ratio:>17.2f}", flush=True)


def timed(work: Callable[[], object]) -> float:
    """Processor seconds of a call."""
    start = time.process_time()
    work()
    return time.process_time() - start


@torch.no_grad()
def generate(model: PreTrainedModel, prompts: list[list[int]], candidates: int) -> Tensor:
    """Transformers' own, with what TRL's trainer asks of it."""
    longest = max(map(len, prompts))
    rows = [[0] * (longest - len(p)) + p for p in prompts for _ in range(candidates)]
    mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts for _ in range(candidates)]
    return model.generate(
        torch.tensor(rows), attention_mask=torch.tensor(mask), do_sample=True, temperature=1.0,
        top_k=0, top_p=1.0, max_new_tokens=NEW, pad_token_id=0,
    )  # fmt: skip


def floor_seconds(model: PreTrainedModel, prompts: list[list[int]], candidates: int) -> float:
    """What the work takes at the least, at this machine's speed of memory and of products."""
    weights = model.num_parameters()  # a tied embedding is counted once, as it is read once
    head = model.get_output_embeddings().weight.numel()
    bytes_a_second, flops = speeds(model.dtype)
    stored = 2  # bytes of a packed weight, float16 or bfloat16
    reading = stored * weights / bytes_a_second
    step = max(reading, 2 * weights * len(prompts) * candidates / flops)
    return step * (NEW - 1) + 2 * (weights - head) * sum(map(len, prompts)) / flops


def speeds(dtype: torch.dtype) -> tuple[float, float]:
    """Bytes a second of reading memory, and operations a second of a large product."""
    large, square = torch.ones(1 << 26), torch.randn(1024, 1024).to(dtype)
    reading = min(timed(large.sum) for _ in range(3))
    product = min(timed(lambda: square @ square) for _ in range(5))
    return large.nbytes / reading, 2 * 1024**3 / product


@torch.no_grad()
def report_differences(
    model: PreTrainedModel, engines: dict[str, Engine], prompts: list[list[int]]
) -> None:
    """How far log-probabilities are from the model's own, and greedy tokens from `generate`'s."""
    greedy = Sampling(temperature=0, top_p=1.0, max_own_tokens=NEW, max_calls=0, seed=0)
    for name, engine in engines.items():
        errors, same = [], []
        for prompt, (answer,) in zip(prompts, engine.answer(prompts, 1, SAMPLING), strict=True):
            logits = model(torch.tensor([prompt + answer.tokens])).logits[0, len(prompt) - 1 : -1]
            own = logits.float().log_softmax(-1)[range(NEW), answer.tokens]
            errors += (own - torch.tensor(answer.log_probs)).abs().tolist()
        for prompt, (answer,) in zip(prompts, engine.answer(prompts, 1, greedy), strict=True):
            tokens = model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)
            same.append(tokens[0, len(prompt) :].tolist() == answer.tokens)
        print(
            f"{name}: log-probabilities {mean(errors):.1e} from the model's own (at most "
            f"{max(errors):.1e}); {sum(same)} of {len(same)} greedy answers are generate's"
        )


# --- TRL, a process of its own ---------------------------------------------------------------


def start_side(python: str, folder: Path) -> subprocess.Popen:
    """A process that answers '4 4' with the seconds which 4 x 4 rollouts took."""
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    side = subprocess.Popen(
        [python, __file__, "--side", str(folder)], cwd=PROJECT, env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    answer_of(side)
    return side


def ask(side: subprocess.Popen, question: str) -> str:
    """Send a line, and give the answer."""
    side.stdin.write(question + "\n")
    side.stdin.flush()
    return answer_of(side)


def answer_of(side: subprocess.Popen) -> str:
    """The next answer, past whatever libraries print. Raises RuntimeError when the side ended."""
    for line in side.stdout:
        if line.startswith("> "):
            return line[2:].strip()
    raise RuntimeError(f"TRL's side ended with {side.wait()}; its error is above")


def serve_trl(folder: Path) -> None:
    """Roll out as GRPOTrainer does, for each line of standard input."""
    import tempfile

    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    with tempfile.TemporaryDirectory() as scratch:
        arguments = GRPOConfig(
            scratch, use_cpu=True, bf16=False, report_to=[], num_generations=4, temperature=1.0,
            per_device_train_batch_size=16, max_completion_length=NEW, gradient_checkpointing=False,
        )  # fmt: skip
        trainer = GRPOTrainer(
            noisy_model(folder),
            lambda completions, **_: [0.0] * len(completions),
            arguments,
            Dataset.from_dict({"prompt": ["one", "two", "three", "four"] * 4}),
            processing_class=open_tokenizer(folder),
        )
        trainer.generation_config.eos_token_id = None
        print("> ready", flush=True)
        for line in sys.stdin:
            prompts, candidates = map(int, line.split())
            rows = [row for row in rows_of(prompts, folder) for _ in range(candidates)]
            taken = timed(lambda rows=rows: trainer._generate_single_turn(rows, None, {}, 4))
            print(f"> {taken}", flush=True)


if __name__ == "__main__":
    main()
