"""Whether what was learnt is kept, or the adapter that it went on from stays; and the figures."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from modeling.lora import Adapted, merged
from modeling.skills import open_skill, save_skill
from stages.learning.student import Student
from stages.measuring.forgetting import Forgetting, compare, row_losses
from stages.measuring.probing import Probe, why_not

BATCH_ROWS = 4  # of general text


@dataclass(frozen=True)
class Verdict:
    """reason: why what was learnt is not kept; None where it is.  probes: the first and the last
    decide.  drift: how far each of the teacher's blocks has moved; empty for a new network."""

    reason: str | None
    probes: Sequence[Probe]
    forgetting: Forgetting
    drift: dict[int, float]

    @property
    def facts(self) -> dict[str, Any]:
        """All of it, for a file."""
        return {
            "reverted": self.reason,
            "probes": [{**vars(probe), "share": str(probe.share)} for probe in self.probes],
            "general": asdict(self.forgetting),
            "drift": self.drift,
        }

    @property
    def metrics(self) -> dict[str, float]:
        """Flat numbers."""
        first, last = self.probes[0], self.probes[-1]
        return {
            "adapter_kept": float(self.reason is None),
            "probe_right_before": round(first.share.value, 6),
            "probe_right": round(last.share.value, 6),
            "probe_own_tokens_before": round(first.own_tokens, 4),
            "probe_own_tokens": round(last.own_tokens, 4),
            "perplexity_ratio": round(self.forgetting.ratio, 6),
            **({"drift": round(max(self.drift.values()), 6)} if self.drift else {}),
        }


def weigh(
    student: Student,
    adapted: Adapted,
    probes: Sequence[Probe],
    text: str,
    rows: Tensor,
    allowed: float,
    reason: str | None = None,
) -> Verdict:
    """Measure what was learnt, and decide.

    rows: held-out tokens (N, T) of the general text of that name, whose perplexity may rise by
    `allowed` against the student's. reason: why it is not kept whatever the figures say.
    """
    before = row_losses(student.untouched, rows, BATCH_ROWS)
    with merged(adapted) as model:
        forgetting = compare(before, row_losses(model, rows, BATCH_ROWS))
        drift = student.drift(model, rows[:BATCH_ROWS])
    found = why_not(probes[0], probes[-1], forgetting, allowed, text)
    return Verdict(reason or found, probes, forgetting, drift)


def write_kept(
    verdict: Verdict, student: Student, adapted: Adapted, start: Path, folder: Path
) -> None:
    """Write the adapter that is kept: what was learnt, or the one in `start` that it went on from.

    A student that reverts carries its old adapter afterwards.
    """
    kept = adapted if verdict.reason is None else open_skill(student.untouched, start)
    save_skill(kept, folder)
