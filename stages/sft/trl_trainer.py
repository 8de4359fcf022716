"""Train an adapter with TRL's SFTTrainer: the same lesson, the same optimizer, another loop.

TRL's are the loop, the collator, the loss (its fused head) and, for a bfloat16 model, autocast.
Ours are what must not differ: which conversations come at which step and which of their tokens
count (`labels`), the rows of general text against forgetting, the optimizer's step (TrainState,
lent to the trainer), and what takes a training back that runs away (learning/recovery.py). So
checkpoints are those of the own loop, and an interrupted training goes on to the same bits.

A batch is cut into as many equal parts as keep each at most `most_tokens` with padding, where one
conversation alone is not longer; the gradients of a step are summed. The general rows go with the
first part.

Not covered, and refused by the parameters: packed rows, a mini mixture of experts. The trainer puts
the model into training mode: dropout of the model's own, where it has any, is on, as it is not in
the own loop.
"""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from modeling.lora import Adapted, adapters_of, check_learning, trainable
from stages.contract import Job
from stages.learning.finetuning import Lesson
from stages.learning.recovery import Limits, Recovery, Rollback
from stages.learning.supervision import Example, alike
from stages.learning.training import TrainState

IGNORED = -100  # the label of a token that no loss counts


def finetune_with_trl(
    adapted: Adapted, lesson: Lesson, job: Job, phase: str, tokenizer: PreTrainedTokenizerBase
) -> list[Rollback]:
    """Train the adapter, in place, as `stages.learning.finetuning.finetune` does.

    tokenizer: SFTTrainer pads with its padding token, and makes EOS that where it has none.
    """
    course = lesson.course
    training = TrainState(trainable(adapted), course.learning_rate, course.steps)
    limits = Limits(course.spike, course.regression)
    recovery = job.resume(Recovery(training, limits, job.folder / "best" / phase), phase)
    if training.step == course.steps:
        return recovery.rollbacks
    trainer = LessonTrainer(adapted, lesson, Lent(recovery, adapted, lesson), tokenizer, job.folder)
    if training.step == 0:
        recovery.begin(trainer.mean_loss(lesson.validation))
    trainer.add_callback(Report(trainer, job, phase))
    trainer.train()
    for changed in (adapted, adapted.get_base_model()):  # TRL and accelerate put a forward on each
        vars(changed).pop("forward", None)
    adapted.eval()
    return recovery.rollbacks


class Lent(torch.optim.Optimizer):
    """A TrainState as an optimizer that somebody else's loop may drive.

    parts, own, general: how much of this step's batch was computed, and its losses so far; the loop
    adds to them.  reason: why the last step was passed over, None where it was taken.  norm: the
    last step's gradient norm.
    """

    def __init__(self, recovery: Recovery, adapted: Adapted, lesson: Lesson) -> None:
        self.recovery = recovery
        self.norm = 0.0
        self.reason: str | None = None
        self.begin()
        self._course = lesson.course
        self._named = trainable(adapted)
        super().__init__([p for _, p in self._named], {"lr": self._course.learning_rate})

    def begin(self) -> None:
        """Forget the losses of the step before."""
        self.parts = 0
        self.own = self.general = 0.0

    def step(self, closure: Any = None) -> None:
        """Take the step, or pass it over and keep the reason. Raises DeadAdapter at the first."""
        training = self.recovery.state
        self.reason = self.recovery.refuses(self.own + self._course.general_weight * self.general)
        if self.reason is None:
            if training.step == 0:
                check_learning(adapters_of(self._named))
            try:
                self.norm = training.update(self._course.warmup, self._course.clip)
                return
            except FloatingPointError as error:
                self.reason = str(error)
        training.pass_over()


class LessonTrainer(SFTTrainer):
    """SFTTrainer whose steps are those of a lesson."""

    loss_is_scaled_for_ga = True  # each part's loss is divided by the counted tokens of the step

    def __init__(
        self,
        adapted: Adapted,
        lesson: Lesson,
        lent: Lent,
        tokenizer: PreTrainedTokenizerBase,
        folder: Path,
    ) -> None:
        self.lesson, self.lent = lesson, lent
        course, first = lesson.course, lent.recovery.state.step
        size = part_size(lesson)
        super().__init__(
            model=adapted,
            args=SFTConfig(
                output_dir=str(folder / "trl"), max_steps=course.steps - first, seed=course.seed,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=course.batch_conversations // size,
                max_grad_norm=0.0,  # the optimizer clips
                lr_scheduler_type="constant",  # and has its own schedule
                train_sampling_strategy="sequential", max_length=None,
                dataset_kwargs={"skip_prepare_dataset": True}, gradient_checkpointing=False,
                bf16=adapted.dtype == torch.bfloat16, use_cpu=adapted.device.type == "cpu",
                logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True,
            ),
            train_dataset=in_order(lesson, first),
            processing_class=tokenizer,
            optimizers=(lent, None),
        )  # fmt: skip
        self.remove_callback(PrinterCallback)

    def compute_loss(
        self, model: Any, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """A part's share of the step's mean cross-entropy, and with the first the general rows'."""
        lent, step = self.lent, self.lent.recovery.state.step
        counted = sum(sum(example.counted) for example in self.lesson.batch(step))
        loss = super().compute_loss(model, inputs, num_items_in_batch=counted)
        lent.own += loss.item()
        lent.parts += 1
        if lent.parts > 1 or not self.lesson.course.general_rows:
            return loss
        rows = self.lesson.general_batch(step).to(model.device)
        inputs = {"input_ids": rows, "labels": rows, "attention_mask": torch.ones_like(rows)}
        general = super().compute_loss(model, inputs, num_items_in_batch=rows[:, 1:].numel())
        lent.general = general.item()
        return loss + self.lesson.course.general_weight * general

    @torch.no_grad()
    def mean_loss(self, examples: list[Example]) -> float:
        """Mean cross-entropy of the counted tokens of examples, in nats."""
        self.model.eval()
        counted = sum(sum(example.counted) for example in examples)
        total = 0.0
        for group in alike(examples, self.lesson.course.most_tokens):
            inputs = self._prepare_inputs(self.data_collator([as_row(one) for one in group]))
            with self.compute_loss_context_manager():
                loss = super().compute_loss(self.model, inputs, num_items_in_batch=counted)
            total += loss.item()
        return total


class Report(TrainerCallback):
    """After each step: validate when it is due, take back what went wrong, tell the job."""

    def __init__(self, trainer: LessonTrainer, job: Job, phase: str) -> None:
        self._trainer = trainer
        self._job = job
        self._phase = phase

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Raises Stopped after a checkpoint when the stage was asked to stop, and RunAway."""
        lent, lesson = self._trainer.lent, self._trainer.lesson
        recovery, course = lent.recovery, lesson.course
        step, reason, metrics = recovery.state.step, lent.reason, {}
        if reason is None:
            metrics = {"loss": lent.own, "general": lent.general, "gradient_norm": lent.norm}
            if step % course.validate_every == 0 or step == course.steps:
                metrics["validation"] = self._trainer.mean_loss(lesson.validation)
                reason = recovery.validated(metrics["validation"])
        if reason is not None:
            back = recovery.roll_back(reason)
            self._job.say(f"{self._phase}: back from step {back.step} to {back.to_step}: {reason}")
        lent.begin()
        self._job.step_done(recovery, step, course.steps, self._phase, **metrics)


def part_size(lesson: Lesson) -> int:
    """Conversations that are computed together: a divisor of a batch, within `most_tokens`."""
    count = lesson.course.batch_conversations
    room = lesson.course.most_tokens // max(map(len, lesson.examples))
    return max(size for size in range(1, count + 1) if count % size == 0 and size <= max(1, room))


def in_order(lesson: Lesson, first: int) -> Dataset:
    """The conversations of all steps from `first` on, one after the other."""
    place = {example: number for number, example in enumerate(lesson.examples)}
    steps = range(first, lesson.course.steps)
    order = [place[example] for step in steps for example in lesson.batch(step)]
    return Dataset.from_list([as_row(example) for example in lesson.examples]).select(order)


def as_row(example: Example) -> dict[str, list[int]]:
    """An example as SFTTrainer's collator takes it."""
    pairs = zip(example.tokens, example.counted, strict=True)
    labels = [token if counted else IGNORED for token, counted in pairs]
    return {"input_ids": list(example.tokens), "labels": labels}
