"""What the student can do with tools: the same problems after each stage that taught it.

Problems are held-out ones by which no stage has decided anything (stages/measuring/problems.py),
answered greedily with live tools, by the student as it was distilled and with the adapter of each
stage.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from stages.measuring.solving import Solved
from stages.measuring.statistics import Share, mcnemar

STEPS = ("student", "sft", "toolformer", "grpo")  # in the order in which they are made
NAMES = {"+": "addition", "-": "subtraction", "*": "multiplication", "/": "division"}


@dataclass
class SkillScores:
    """What was solved so far, by step; grows part by part, and can be saved half-way."""

    solved: dict[str, list[Solved]] = field(default_factory=lambda: {name: [] for name in STEPS})

    def save(self, folder: Path) -> None:
        """Write skills.json."""
        fields = {name: [asdict(one) for one in solved] for name, solved in self.solved.items()}
        (folder / "skills.json").write_text(json.dumps(fields), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""
        fields = json.loads((folder / "skills.json").read_text(encoding="utf-8"))
        self.solved = {name: [Solved(**one) for one in solved] for name, solved in fields.items()}

    @property
    def done(self) -> int:
        """How many answers there are, of all steps."""
        return sum(map(len, self.solved.values()))


@dataclass(frozen=True)
class Skill:
    """What one step is worth.

    groups: shares by operation.  p_value: McNemar's, against the step before; None for the first.
    """

    right: Share
    formatted: Share
    own_tokens: float
    groups: dict[str, Share]
    p_value: float | None


def assess(scores: SkillScores) -> dict[str, Skill]:
    """Each step's shares, and whether it differs from the one before."""
    found: dict[str, Skill] = {}
    before: list[bool] | None = None
    for name, solved in scores.solved.items():
        right = [one.right for one in solved]
        groups = {NAMES.get(key, key): share for key, share in _by_operation(solved).items()}
        found[name] = Skill(
            Share(sum(right), len(right)),
            Share(sum(one.formatted for one in solved), len(solved)),
            sum(one.own_tokens for one in solved) / len(solved),
            groups,
            None if before is None else mcnemar(before, right),
        )
        before = right
    return found


def _by_operation(solved: Sequence[Solved]) -> dict[str, Share]:
    groups: dict[str, list[bool]] = {}
    for one in solved:
        groups.setdefault(one.operation, []).append(one.right)
    return {name: Share(sum(right), len(right)) for name, right in groups.items()}


def flatten_skills(skills: dict[str, Skill]) -> dict[str, float]:
    """Flat metrics: skills.STEP.right with its interval, by operation, and own tokens."""
    flat: dict[str, float] = {}
    for name, skill in skills.items():
        low, high = skill.right.interval
        values = {"right": skill.right.value, "right_low": low, "right_high": high}
        values |= {group: share.value for group, share in skill.groups.items()}
        values |= {"formatted": skill.formatted.value, "own_tokens": skill.own_tokens}
        flat |= {f"skills.{name}.{key}": round(value, 6) for key, value in values.items()}
    return flat


def skill_verdicts(skills: dict[str, Skill]) -> list[str]:
    """What the shares say, in sentences; a step that does not help is named."""
    sentences = []
    for name, skill in skills.items():
        sentence = (
            f"Word problems with tools, {name}: {skill.right} of {skill.right.count} right, "
            f"{skill.own_tokens:.0f} own tokens an answer"
        )
        if skill.p_value is not None:
            differs = "differs" if skill.p_value < 0.05 else "does NOT clearly differ"
            sentence += f"; it {differs} from the step before (McNemar p = {skill.p_value:.2g})"
        sentences.append(f"{sentence}.")
    return sentences
