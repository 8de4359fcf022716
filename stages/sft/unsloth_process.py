"""Train an adapter with unsloth, in a process of its own.

unsloth changes the classes of transformers for the process that it is imported in
(modeling/unsloth_model.py), and what comes after training is measured with the model's own code. So
a second process opens the student and its fresh adapter with unsloth, trains it as any with
SFTTrainer (stages/sft/trl_trainer.py), and ends; the last checkpoint has the result. That process
writes the steps and checkpoints of the job; this one waits, passes a request to stop on, and raises
what was raised there. Its student stays on the GPU meanwhile.
"""

import json
import os
import signal
from concurrent.futures import ProcessPoolExecutor, wait
from multiprocessing import get_context
from multiprocessing.synchronize import Event
from pathlib import Path

from stages.contract import Job
from stages.declaration import Declaration
from stages.process import StopRequest, die_with_parent

LOOK_EVERY_S = 0.2
_stop = StopRequest()  # of the other process, where `begin` makes it


class Passed(StopRequest):
    """A request to stop that another process passes on."""

    def __init__(self, event: Event) -> None:
        self._event = event

    @property
    def requested(self) -> bool:
        """Whether the other process was asked to stop."""
        return self._event.is_set()


def train_with_unsloth(adapted, lesson, job: Job, phase: str) -> None:
    """Train a fresh adapter of the student up to its last checkpoint.

    The adapter that is given stays as it is. Raises Stopped, or whatever ended the training.
    """
    start = job.folder / "unsloth" / phase
    write_start(adapted, start, job.input("distill") / "student")
    context = get_context("spawn")
    stop = context.Event()
    compiled = job.folder / "unsloth" / "compiled"
    with ProcessPoolExecutor(1, context, begin, (compiled, stop)) as pool:
        training = pool.submit(train, start, lesson, job.root, job.declaration, phase)
        while wait([training], LOOK_EVERY_S).not_done:
            if job.is_stopping:
                stop.set()
        training.result()


def write_start(adapted, folder: Path, student: Path) -> None:
    """Write a fresh adapter so that whoever opens it finds the student."""
    from modeling.lora import save_adapter

    save_adapter(adapted, folder)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = str(student.resolve())
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")


def begin(compiled: Path, stop: Event) -> None:
    """In the other process, before anything else: whom it obeys, and unsloth's import."""
    global _stop
    die_with_parent()
    for number in (signal.SIGTERM, signal.SIGINT):  # the first process is asked, and passes it on
        signal.signal(number, signal.SIG_IGN)
    _stop = Passed(stop)
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(compiled))  # else the current folder
    import modeling.unsloth_model  # noqa: F401


def train(start: Path, lesson, root: Path, declaration: Declaration, phase: str) -> None:
    """In the other process: open with unsloth, and train."""
    from modeling.unsloth_model import open_with_unsloth
    from stages.sft.trl_trainer import finetune_with_trl

    longest = max(max(map(len, lesson.examples)), lesson.general.shape[1])
    adapted, tokenizer = open_with_unsloth(start, longest)
    finetune_with_trl(adapted, lesson, Job(root, declaration, _stop), phase, tokenizer)
