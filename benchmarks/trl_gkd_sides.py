"""The two sides of benchmarks/trl_gkd.py, and what both start from; started by it.

    prepare FOLDER   makes FOLDER/targets, of rows of random tokens, and a link to the teacher
    NAME FOLDER      one side: takes a step on the batch of a number that it is asked for

A step costs the same whatever the tokens are, so no data set is needed.
"""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import nn

from benchmarks.turns import Figures, Stopwatch, answer
from modeling.fast_path import fast_path
from modeling.loading import locate, open_model, open_tokenizer, weights_folder
from modeling.streaming import Passage
from modeling.weights import Resident
from stages.distill.objective import AnchorMaps, Objective, Weights, place_anchors, trainable
from stages.distill.student import build_student
from stages.extract.harvest import Wanted, harvest
from stages.formats.importance import Subspaces
from stages.formats.targets import TeacherTargets, write_header, write_shard
from stages.learning.training import TrainState
from stages.process import keep_freed_memory

TEACHER = "smollm2-135m"
DROPPED, PREFIX, ANCHORS = [12, 13, 14, 17, 25, 26], 10, (19, 29)  # presets/laptop.yaml makes these
TOP_K, RANK, ROWS, BATCH_ROWS, ROW_TOKENS = 64, 64, 4, 2, 256
WEIGHTS = Weights(kd=1.0, ce=0.2, anchor=0.5, temperature=1.0)
RATE, STEPS, WARMUP, CLIP = 3e-4, 320, 0.05, 1.0

Step = Callable[[int], None]


def main(name: str, folder: Path) -> None:
    """Make what both start from, or be one side."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if name == "prepare":
        prepare(folder)
        return
    with ExitStack() as stack:
        what, step = trl_step(folder) if name == "TRL" else our_step(folder, name, stack)

        def timed(number: int) -> Figures:
            watch = Stopwatch()
            step(number % (ROWS // BATCH_ROWS))
            processor, wall = watch.read()
            return {"processor s": processor, "wall s": wall}

        answer(what, timed)


@torch.no_grad()
def prepare(folder: Path) -> None:
    """Targets as stages/extract makes them, of random rows."""
    (folder / "teacher").symlink_to(weights_folder(locate(TEACHER)))  # TRL's Python has no packages
    teacher = open_model(folder / "teacher")
    tokens = torch.randint(teacher.config.vocab_size, (ROWS, ROW_TOKENS))
    passage = Passage(
        teacher,
        teacher.model.layers,
        Resident(teacher),
        [{"input_ids": tokens, "use_cache": False}],
    )
    kept: dict[str, torch.Tensor] = {}
    for sheaf in harvest(passage, [tokens], Wanted(TOP_K, PREFIX, ANCHORS, subspaces(teacher))):
        kept.update(sheaf.tensors)
    (folder / "targets").mkdir()
    write_shard(folder / "targets", 0, kept)
    fields = {"teacher": TEACHER, "prefix_blocks": PREFIX, "anchors": ANCHORS}
    write_header(folder / "targets", **fields, rows=ROWS, row_tokens=ROW_TOKENS)


def subspaces(teacher: nn.Module) -> Subspaces:
    """Random directions: their number alone decides what a step costs."""
    blocks, width = teacher.config.num_hidden_layers, teacher.config.hidden_size
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(blocks, width, RANK, generator=generator)
    directions = torch.linalg.qr(directions)[0]
    return Subspaces(torch.zeros(blocks, width), directions, torch.ones(blocks, RANK))


def our_step(folder: Path, name: str, stack: ExitStack) -> tuple[str, Step]:
    """A step of stages/distill/training.py, without its validation and checkpoints."""
    keep_freed_memory()
    teacher = open_model(folder / "teacher")
    student, base = build_student(teacher, DROPPED), subspaces(teacher)
    del teacher
    targets = TeacherTargets(folder / "targets")
    anchors = place_anchors(ANCHORS, DROPPED, [1.0] * 30)
    maps = AnchorMaps(anchors, student.config.hidden_size)
    named = trainable(student, PREFIX, maps)
    state = TrainState(named, RATE, STEPS)
    objective = Objective(student, PREFIX, anchors, maps, base, WEIGHTS)
    if name == "ours":
        stack.enter_context(fast_path(student, lambda said: print(said, file=sys.stderr)))

    def step(number: int) -> None:
        first = number * BATCH_ROWS
        objective(targets.rows(torch.arange(first, first + BATCH_ROWS))).total.backward()
        state.update(WARMUP, CLIP)

    return describe(student, named), step


def trl_step(folder: Path) -> tuple[str, Step]:
    """A step of TRL's trainer on its own terms, but without gradient checkpointing."""
    import trl  # in the other environment alone
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    keep_freed_memory()
    teacher = open_model(folder / "teacher")
    student = build_student(teacher, DROPPED).requires_grad_(True).train()
    tokenizer = open_tokenizer(folder / "teacher")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokens = TeacherTargets(folder / "targets").rows(torch.arange(ROWS)).tokens
    options = GKDConfig(
        output_dir=str(folder / "trl"), lmbda=0.0, beta=0.0, temperature=1.0, learning_rate=RATE,
        per_device_train_batch_size=BATCH_ROWS, max_steps=STEPS, gradient_checkpointing=False,
        use_cpu=True, bf16=False, report_to="none", max_length=ROW_TOKENS,
    )  # fmt: skip
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    trainer = GKDTrainer(
        model=student, teacher_model=teacher, args=options, processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"messages": [messages] * ROWS}),
    )  # fmt: skip
    trainer.create_optimizer_and_scheduler(num_training_steps=STEPS)
    trainer.current_gradient_accumulation_steps = 1  # its own loop, which is left out, sets it

    def step(number: int) -> None:
        ids = tokens[number * BATCH_ROWS : (number + 1) * BATCH_ROWS].clone()
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
        trainer.training_step(trainer.model, inputs)
        nn.utils.clip_grad_norm_(trainer.model.parameters(), CLIP)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    named = list(student.named_parameters())
    return f"trl {trl.__version__}, {describe(student, named)}", step


def describe(student: nn.Module, trained: list) -> str:
    """What is about to be measured."""
    count = sum(parameter.numel() for _, parameter in trained) / 1e6
    return f"{student.dtype}, {count:.1f} M parameters train"


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
