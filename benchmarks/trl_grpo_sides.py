"""The sides of benchmarks/trl_grpo.py, and what they start from; started by it."""

import json
import sys
import time
import zlib
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch

from benchmarks.turns import Figures, Stopwatch, answer
from modeling.fast_path import fast_path
from modeling.loading import locate, open_model, open_tokenizer, weights_folder
from modeling.lora import (
    Adapted,
    AdapterShape,
    adapt,
    merged,
    open_adapted,
    save_adapter,
    trainable,
)
from runtime.generation.answers import Sampling
from runtime.generation.engine import Engine
from runtime.prompt import prompt_tokens
from stages.grpo.objective import advantages
from stages.grpo.policy import Policy, Trace, accumulate
from stages.grpo.rollouts import example_of
from stages.learning.training import TrainState
from stages.prepare.word_problems import training_problems
from stages.process import keep_freed_memory

STUDENT, SHAPE = "smollm2-135m", AdapterShape(16, 32.0, "lora")
CANDIDATES, MOST_OWN, BATCHES, MOST_TOKENS = 4, 48, 4, 2048
LOSS, EPSILON, RATE, STEPS, WARMUP, CLIP = "dr_grpo", 0.2, 1e-4, 60, 0.1, 0.5

Step = Callable[[list[list[int]], int], tuple[float, int]]  # -> generation seconds, tokens


def main(name: str, folder: Path) -> None:
    """Be a side, or make what they start from."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if name == "prepare":
        make(folder)
        return
    keep_freed_memory()
    prompts = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    adapted = open_adapted(open_model(folder / "student"), folder / "adapter", trains=True)
    count = len(prompts) // BATCHES
    take = trl_step(adapted, folder, count) if name == "TRL" else our_step(adapted, folder)

    def step(number: int) -> Figures:
        first = number % BATCHES * count
        watch = Stopwatch()
        generation, tokens = take(prompts[first : first + count], number)
        processor, wall = watch.read()
        return {
            "generation s": generation, "update s": processor - generation, "wall s": wall,
            "tokens": tokens, "ms a token": 1e3 * processor / tokens,
        }  # fmt: skip

    answer(f"{sum(p.numel() for _, p in trainable(adapted)) / 1e6:.1f} M parameters train", step)


def make(folder: Path) -> None:
    """Prompts as tokens, a fresh adapter, and a link to the student."""
    (folder / "student").symlink_to(weights_folder(locate(STUDENT)))
    tokenizer = open_tokenizer(folder / "student")
    count = BATCHES * int((folder / "prompts").read_text(encoding="utf-8"))
    problems = islice(training_problems(0), count)
    prompts = [prompt_tokens(problem.prompt, tokenizer) for problem in problems]
    (folder / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
    adapted = adapt(open_model(folder / "student"), SHAPE, 0, folder / "start")
    save_adapter(adapted, folder / "adapter", folder / "start")


def reward(tokens: list[int]) -> float:
    """A number from 0 to 1 that depends on every token."""
    return zlib.crc32(json.dumps(tokens).encode()) / 2**32


def our_step(adapted: Adapted, folder: Path) -> Step:
    """A step of stages/grpo, without tools, probes and checkpoints."""
    tokenizer = open_tokenizer(folder / "student")
    policy = Policy.of(adapted, tokenizer.eos_token_id, MOST_TOKENS, 1.0)
    training = TrainState(trainable(adapted), RATE, STEPS)
    with merged(adapted) as model:
        engine = Engine(model, tokenizer)

    def step(prompts: list[list[int]], number: int) -> tuple[float, int]:
        began = time.process_time()
        with merged(adapted):
            engine.refresh()
            groups = engine.answer(prompts, CANDIDATES, Sampling(1.0, 1.0, MOST_OWN, 0, number))
        generation = time.process_time() - began
        rewards = torch.tensor([[reward(a.tokens) for a in group] for group in groups])
        better = advantages(rewards, LOSS).tolist()
        traces = [
            Trace(example_of(prompt, one), advantage)
            for prompt, group, row in zip(prompts, groups, better, strict=True)
            for one, advantage in zip(group, row, strict=True)
        ]
        with fast_path(policy.model, lambda said: print(said, file=sys.stderr)):
            accumulate(policy, traces, LOSS, EPSILON, 0.0, MOST_OWN)
        training.update(WARMUP, CLIP)
        return generation, sum(trace.own for trace in traces)

    return step


def trl_step(adapted: Adapted, folder: Path, count: int) -> Step:
    """A step of GRPOTrainer on its own terms, but without gradient checkpointing."""
    from datasets import Dataset  # in the other environment alone
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = open_tokenizer(folder / "student")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    options = GRPOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=count * CANDIDATES,
        num_generations=CANDIDATES, max_completion_length=MOST_OWN, temperature=1.0, beta=0.0,
        loss_type=LOSS, scale_rewards="none", epsilon=EPSILON, learning_rate=RATE, max_steps=STEPS,
        gradient_checkpointing=False, use_cpu=True, bf16=False, report_to="none",
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=adapted, args=options, processing_class=tokenizer,
        reward_funcs=lambda completion_ids, **_: [reward(ids) for ids in completion_ids],
        train_dataset=Dataset.from_dict({"prompt": ["a"] * count * CANDIDATES}),
    )  # fmt: skip
    trainer.create_optimizer_and_scheduler(num_training_steps=STEPS)
    trainer.model_wrapped = trainer.model
    trainer.current_gradient_accumulation_steps = 1  # its own loop, which is left out, sets it
    generate, seen = trainer._generate, {}

    def timed(prompts: list) -> tuple:
        began = time.process_time()
        found = generate(prompts)
        seen["seconds"] = time.process_time() - began
        return found

    trainer._generate = timed

    def step(prompts: list[list[int]], _number: int) -> tuple[float, int]:
        texts = [text for text in tokenizer.batch_decode(prompts) for _ in range(CANDIDATES)]
        trainer.training_step(trainer.model.train(), [{"prompt": text} for text in texts], None)
        torch.nn.utils.clip_grad_norm_(adapted.parameters(), CLIP)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        (made,) = trainer._buffered_inputs
        return seen["seconds"], int(made["completion_mask"].sum())

    return step


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
