"""The sides of benchmarks/trl_sft.py, and what they start from; started by it."""

import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import torch

from benchmarks.turns import Figures, Stopwatch, answer
from modeling.fast_path import fast_path
from modeling.loading import locate, open_model, open_tokenizer, weights_folder
from modeling.lora import Adapted, AdapterShape, adapt, open_adapted, save_adapter, trainable
from stages.learning.finetuning import rows_loss
from stages.learning.supervision import (
    Example,
    Rows,
    SharedRows,
    encode,
    lay_out,
    share,
    side_by_side,
)
from stages.learning.training import TrainState
from stages.prepare.word_problems import training_problems
from stages.process import keep_freed_memory

STUDENT, SHAPE = "smollm2-135m", AdapterShape(16, 32.0, "lora")
BATCH, BATCHES, MOST_TOKENS = 16, 4, 2048  # presets/laptop.yaml
RATE, STEPS, WARMUP, CLIP = 1e-3, 60, 0.1, 1.0


def main(name: str, folder: Path) -> None:
    """Be a side, or make what they start from."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if name == "prepare":
        make(folder)
        return
    keep_freed_memory()
    examples = [Example(*map(tuple, entry)) for entry in json.loads(read(folder))]
    model = open_model(folder / "student")
    adapted = open_adapted(model, folder / "adapter", trains=True)
    with ExitStack() as stack:
        if name == "TRL":
            take = trl_step(adapted, folder)
        else:
            fast = name == "ours"
            if fast:
                stack.enter_context(fast_path(adapted.get_base_model(), tell))
            take = our_step(adapted, folder, shares=fast)

        def step(number: int) -> Figures:
            first = number % BATCHES * BATCH
            watch = Stopwatch()
            loss = take(examples[first : first + BATCH])
            processor, wall = watch.read()
            return {"processor s": processor, "wall s": wall, "loss": loss}

        count = sum(p.numel() for _, p in trainable(adapted)) / 1e6
        answer(f"{model.dtype}, {count:.1f} M parameters train", step)


def make(folder: Path) -> None:
    """Conversations as tokens, a fresh adapter, and a link to the student."""
    (folder / "student").symlink_to(weights_folder(locate(STUDENT)))
    tokenizer = open_tokenizer(folder / "student")
    problems = islice(training_problems(0), BATCH * BATCHES)
    examples = [encode(problem, tokenizer) for problem in problems]
    entries = [(example.tokens, example.counted) for example in examples]
    (folder / "examples.json").write_text(json.dumps(entries), encoding="utf-8")
    adapted = adapt(open_model(folder / "student"), SHAPE, 0, folder / "start")
    save_adapter(adapted, folder / "adapter", folder / "start")


def read(folder: Path) -> str:
    """The conversations."""
    return (folder / "examples.json").read_text(encoding="utf-8")


def tell(text: str) -> None:
    """Say what keeps the model's own code."""
    print(text, file=sys.stderr)


def our_step(adapted: Adapted, folder: Path, shares: bool) -> Callable[[list[Example]], float]:
    """A step of stages/learning/finetuning.py, without general text, validation and checkpoints."""
    training = TrainState(trainable(adapted), RATE, STEPS)
    model, pad = adapted.get_base_model(), open_tokenizer(folder / "student").eos_token_id

    def laid_out(batch: list[Example]) -> list[Rows | SharedRows]:
        if not shares:
            return list(lay_out(batch, pad, MOST_TOKENS, packs=False))
        return [share([batch[n] for n in group]) for group in side_by_side(batch, MOST_TOKENS)]

    def step(batch: list[Example]) -> float:
        counted = sum(sum(example.counted) for example in batch)
        total = 0.0
        for rows in laid_out(batch):
            loss = rows_loss(model, rows) / counted
            loss.backward()
            total += loss.item()
        training.update(WARMUP, CLIP)
        return total

    return step


def trl_step(adapted: Adapted, folder: Path) -> Callable[[list[Example]], float]:
    """A step of SFTTrainer on its own terms, but without gradient checkpointing."""
    from datasets import Dataset  # in the other environment alone
    from trl import SFTConfig, SFTTrainer

    tokenizer = open_tokenizer(folder / "student")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    options = SFTConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=BATCH, learning_rate=RATE,
        max_steps=STEPS, gradient_checkpointing=False, use_cpu=True, bf16=False, report_to="none",
    )  # fmt: skip
    trainer = SFTTrainer(
        model=adapted, args=options, processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"prompt": ["a"] * BATCH, "completion": ["b"] * BATCH}),
    )  # fmt: skip
    trainer.create_optimizer_and_scheduler(num_training_steps=STEPS)
    trainer.current_gradient_accumulation_steps = 1  # its own loop, which is left out, sets it

    def step(batch: list[Example]) -> float:
        inputs = trainer.data_collator(
            [
                {
                    "input_ids": list(example.tokens),
                    "labels": [
                        t if c else -100 for t, c in zip(*vars(example).values(), strict=True)
                    ],
                }
                for example in batch
            ]
        )
        counted = (inputs["labels"] != -100).sum()
        loss = trainer.training_step(trainer.model, inputs, counted)
        torch.nn.utils.clip_grad_norm_(adapted.parameters(), CLIP)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return loss.item()

    return step


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
