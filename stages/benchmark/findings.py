"""All that a benchmark found, and what its models are called."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.benchmark.routing import RoutingFound
from stages.benchmark.scoring import TEACHER, Estimate
from stages.benchmark.skills import Skill

STUDENT = "student"
LABELS = {
    TEACHER: "teacher",
    STUDENT: "student",
    "before_training": "student before training",
    "text_only": "control: trained on the text alone",
    "without_anchors": "control: trained without anchors",
    "without_text": "control: trained without the text",
    "without_answers": "control: trained without the teacher's answers",
}


@dataclass(frozen=True)
class Findings:
    """Everything that a report says.

    facts: student.json.  table: model -> text -> measure -> Estimate.  speed: model -> numbers.
    drift: model -> teacher block -> its drift (stages/measuring/drift.py); empty where the student
    has none of the teacher's blocks.  skills: problems solved with tools, by the stage that taught
    it.  routing: what choosing adapters is worth; None where it was not measured.
    """

    facts: dict[str, Any]
    table: dict[str, dict[str, dict[str, Estimate]]]
    speed: dict[str, dict[str, float]]
    profile_picture: Path
    drift: dict[str, dict[int, float]] = field(default_factory=dict)
    skills: dict[str, Skill] = field(default_factory=dict)
    routing: RoutingFound | None = None

    @property
    def texts(self) -> list[str]:
        """Names of the texts measured on; the first is what the student was trained for."""
        return list(self.table[TEACHER])

    @property
    def controls(self) -> list[str]:
        """Models that are neither teacher nor student, in the order of LABELS."""
        order = list(LABELS)
        others = [name for name in self.table if name not in (TEACHER, STUDENT)]
        return sorted(others, key=lambda n: order.index(n) if n in order else len(order))
