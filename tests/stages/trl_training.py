"""What sft's trainers make of the same, for tests/stages/test_trl_trainer.py; by a Python with TRL.

    trl_training.py FOLDER         writes FOLDER/found.json

unsloth is a stand-in that lies on the path: tests/stages/stand_ins/unsloth.
"""

import json
import math
import shutil
import sys
from pathlib import Path

import torch

import modeling.backends
from modeling.lora import DeadAdapter, adapt, trainable
from stages.learning.finetuning import finetune
from stages.learning.recovery import Limits, Recovery, Rollback
from stages.learning.training import TrainState
from stages.process import Stopped
from stages.sft.trl_trainer import Lent, finetune_with_trl
from tests.runtime.conversing import letters
from tests.stages.skill_dag import PLAIN, capability, make_skill_dag
from tests.stages.test_finetuning import SHAPE, Desk, lesson
from tests.stages.tiny_dag import StopAt, TinyDag
from tests.stages.trl_lessons import LESSONS, STEPS
from tests.tiny import tiny_llama


class Killed(BaseException):
    """Nothing of ours comes to know of it, as of a SIGKILL."""


class KillAt(StopAt):
    """Ends it in the middle of a step's record: its checkpoint is not written."""

    def watch(self, job) -> None:
        add = job.progress.add

        def watched(phase: str, step: int, *rest) -> None:
            if (phase, step) == self.at:
                raise Killed
            add(phase, step, *rest)

        job.progress.add = watched


class StopAtOnce(StopAt):
    """Asks to stop before anything has begun."""

    def watch(self, job) -> None:
        self.requested = True


class Notes(Desk):
    """A desk that keeps all that it is told of the steps."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.told: list[dict[str, float]] = []

    def step_done(self, _state, _step, _total, _phase, **metrics: float) -> None:
        self.told.append(metrics)


def both(folder: Path, **changes) -> dict:
    """The curves, rollbacks and weights of the own loop and of TRL's, on the same lesson."""
    found = {}
    for name in ("own", "trl"):
        adapted = adapt(tiny_llama(), SHAPE, 0, folder / name)
        notes, taught = Notes(folder / name), lesson(steps=STEPS, **changes)
        if name == "own":
            backs: list[Rollback] = finetune(adapted, taught, notes, "tools")
        else:
            backs = finetune_with_trl(adapted, taught, notes, "tools", letters())
        weights = torch.cat([p.detach().flatten() for _, p in trainable(adapted)])
        found[name] = {
            "curve": notes.told,
            "rollbacks": [[back.step, back.to_step] for back in backs],
            "weights": weights.tolist(),
            "forwards": [
                n for n, m in adapted.named_modules() if "forward" in vars(m) or m.training
            ],
        }
    return found


def interrupted(dag: TinyDag) -> dict:
    """Whether the same bytes come out after stops and a kill, and where it went on."""
    dag.run("sft")
    published = dag.published("sft")
    shutil.rmtree(dag.root / "scratch")
    shutil.rmtree(dag.root / "artifacts/sft")
    said = []
    for stop in (StopAt("tools", 1), KillAt("tools", 3), StopAt("tools", 3)):
        try:
            dag.run("sft", stop)
        except (Stopped, Killed) as error:
            said.append(f"{type(error).__name__} {error}".strip())
    dag.run("sft")
    return {"said": said, "same": dag.published("sft") == published}


def dead(folder: Path) -> str:
    """What is said of adapters behind a layer of zeros."""
    model = tiny_llama()
    model.model.layers[1].self_attn.o_proj.weight.data.zero_()
    adapted = adapt(model, SHAPE, 0, folder)
    try:
        finetune_with_trl(adapted, lesson(steps=2), Desk(folder), "tools", letters())
    except DeadAdapter as error:
        return str(error)
    return "nothing"


def passed_over(folder: Path) -> list[dict]:
    """What becomes of steps whose loss, and whose gradient, is not finite."""
    adapted, taught = adapt(tiny_llama(), SHAPE, 0, folder), lesson(steps=STEPS)
    named = trainable(adapted)
    training = TrainState(named, taught.course.learning_rate, STEPS)
    lent = Lent(Recovery(training, Limits(3.0, 1.0), folder), adapted, taught)
    before = [p.detach().clone() for _, p in named]
    found = []
    for loss, gradient in ((math.nan, 1.0), (1.0, math.inf)):
        lent.own = loss
        for _, parameter in named:
            parameter.grad = torch.full_like(parameter, gradient)
        lent.step()
        same = all(torch.equal(p, b) for (_, p), b in zip(named, before, strict=True))
        found.append({"reason": lent.reason, "step": training.step, "same": same})
    return found


def with_stand_in(dag: TinyDag) -> dict:
    """The stage with `trainer: unsloth`, stopped once and run to its end, beside `trainer: trl`."""
    modeling.backends.what_is_missing = lambda package: []
    trl = dag.run("sft")
    dag.set("sft", trainer="unsloth")
    try:
        dag.run("sft", StopAtOnce("tools", 0))
        said = "nothing"
    except Stopped as error:
        said = str(error)
    return {"said": said, "trl": trl, "unsloth": dag.run("sft")}


def main(folder: Path) -> None:
    """Run all of it, in one process: importing TRL takes seconds."""
    torch.set_num_threads(1)
    found: dict = {"lessons": {n: both(folder / n, **c) for n, c in LESSONS.items()}}
    (folder / "dag").mkdir()
    dag = make_skill_dag(folder / "dag")
    dag.set("sft", trainer="trl", capabilities=[capability("tools", PLAIN)], variant="pissa")
    found["interrupted"] = interrupted(dag)
    dag.set("sft", variant="lora")
    found["unsloth"] = with_stand_in(dag)
    found["passed over"] = passed_over(folder / "passed")
    found["dead"] = dead(folder / "dead")
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
