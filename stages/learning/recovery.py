"""Recovery: a training that runs away is taken back to its best state, and says why.

A batch is refused when its loss or gradient is not finite, or when its loss is far above the median
of the last ones (a spike); a state is refused when its loss on validation rows, which are never
trained on, is well above the best so far. Then weights and optimizer are those of the best
validated state again, the learning rate is halved for what is left, and the batch is passed over
(PaLM, Chowdhery 2022, section 5.1: restart before a spike, skip its batches). Steps are not
repeated, so a run's length is known beforehand. After MOST rollbacks it ends with an error.

All of it is part of the checkpoint, and the best states lie beside it by their steps: a run that is
interrupted goes on to the same bits.
"""

import json
import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from stages.learning.training import TrainState

WINDOW, ENOUGH = 50, 20  # losses that a spike is measured by, and how many there must be
MOST = 5  # rollbacks
SLOWER = 0.5  # the learning rate after each


class RunAway(RuntimeError):
    """Training went wrong again and again; the message says how, and what to change."""


@dataclass(frozen=True)
class Limits:
    """From where on a loss is refused, in units of the loss before training.

    Not of the loss itself: that may come near zero, and below where it is estimated from draws.
    """

    spike: float  # above the median of the last ones
    regression: float  # of validation, above its best


@dataclass(frozen=True)
class Rollback:
    """One return to the best state."""

    step: int
    to_step: int
    reason: str


class Recovery:
    """A training state with a memory of its best one."""

    def __init__(
        self, state: TrainState, limits: Limits, folder: Path, writes: bool = True
    ) -> None:
        """folder: where best states are kept, of this phase alone.

        writes: False in processes that train along with the one that writes the best states.
        """
        self.state = state
        self.limits = limits
        self.rollbacks: list[Rollback] = []
        self._folder = folder
        self._writes = writes
        self._recent: list[float] = []
        self._unit = math.inf  # the loss before training
        self._best_loss = math.inf
        self._best_step = -1  # none yet
        self._saved_best = -1  # of the checkpoint before

    def begin(self, validation: float) -> None:
        """Before the first step: the state that there is is the best so far.

        Raises RunAway when even its loss is not finite.
        """
        if not math.isfinite(validation):
            raise RunAway(
                f"before any training the loss on validation rows is {validation}: the weights "
                "that it starts from, or the targets, hold numbers that are not finite"
            )
        self._unit = abs(validation)
        self._keep(validation)

    def refuses(self, loss: float) -> str | None:
        """Why a batch with this loss must not be learnt from; None when it may."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        usual = median(self._recent) if len(self._recent) >= ENOUGH else math.inf
        if loss > usual + self.limits.spike * self._unit:
            return f"the loss is {loss:.3g}, the median of the last ones {usual:.3g}"
        self._recent = [*self._recent[1 - WINDOW :], loss]
        return None

    def validated(self, loss: float) -> str | None:
        """Take note of a validation; gives why the state must not be kept, else None."""
        if not loss <= self._best_loss + self.limits.regression * self._unit:  # NaN is not
            return f"validation is {loss:.4g}, its best was {self._best_loss:.4g}"
        if loss < self._best_loss:
            self._keep(loss)
        return None

    def roll_back(self, reason: str) -> Rollback:
        """Go back to the best state, slower. Raises RunAway when that happened too often."""
        step, scale = self.state.step, self.state.scale * SLOWER
        if len(self.rollbacks) >= MOST:
            raise RunAway(
                f"training was taken back {MOST} times and went wrong again at step {step}: "
                f"{reason}; lower the learning rate"
            )
        self.state.load(self._place(self._best_step))
        self.state.step, self.state.scale = step, scale
        self.rollbacks.append(Rollback(step, self._best_step, reason))
        self._recent = []
        return self.rollbacks[-1]

    def save(self, folder: Path) -> None:
        """Write the training state, and recovery.json."""
        self.state.save(folder)
        fields = {
            "rollbacks": [asdict(rollback) for rollback in self.rollbacks],
            "recent": self._recent,
            "unit": self._unit,
            "best_loss": self._best_loss,
            "best_step": self._best_step,
        }
        (folder / "recovery.json").write_text(json.dumps(fields), encoding="utf-8")
        self._forget_but({self._best_step, self._saved_best})
        self._saved_best = self._best_step

    def load(self, folder: Path) -> None:
        """Take over what `save` wrote."""
        self.state.load(folder)
        fields = json.loads((folder / "recovery.json").read_text(encoding="utf-8"))
        self.rollbacks = [Rollback(**entry) for entry in fields["rollbacks"]]
        self._recent, self._unit = fields["recent"], fields["unit"]
        self._best_loss, self._best_step = fields["best_loss"], fields["best_step"]
        self._saved_best = self._best_step

    def _keep(self, loss: float) -> None:
        if self._writes:
            part = self._place(self.state.step).with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            self.state.save(part)
            shutil.rmtree(self._place(self.state.step), ignore_errors=True)
            part.rename(self._place(self.state.step))
        self._best_loss, self._best_step = loss, self.state.step

    def _place(self, step: int) -> Path:
        return self._folder / f"best-{step:08d}"

    def _forget_but(self, steps: set[int]) -> None:
        for path in self._folder.glob("best-*[0-9]"):
            if int(path.name.removeprefix("best-")) not in steps:
                shutil.rmtree(path)
