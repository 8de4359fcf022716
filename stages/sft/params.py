"""What can be set of sft."""

import importlib.util
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from stages.agreement import require_general_text, require_prepared
from stages.learning.course import Course
from stages.params import require_at_least, require_one_of, require_within

VARIANTS = ("lora", "rslora", "dora", "pissa")  # of modeling/lora.py, which imports torch
OWN, TRL, UNSLOTH = "own", "trl", "unsloth"


@dataclass(frozen=True)
class Experts:
    """A mini mixture of experts behind a block (modeling/moe.py): ExpertsShape without torch."""

    after_block: int
    experts: int
    units: int
    temperature: float
    balance: float

    def __post_init__(self) -> None:
        require_at_least(1, after_block=self.after_block, units=self.units)
        require_within(2, 64, experts=self.experts)
        require_within(0.01, 100, temperature=self.temperature)
        require_within(0, 10, balance=self.balance)


@dataclass(frozen=True)
class OwnCourse:
    """What one skill's training has in place of the section's values."""

    steps: int
    learning_rate: float
    general_weight: float


@dataclass(frozen=True)
class Capability:
    """A skill: its name, what it is learnt from, and what changes for it.

    course: None for the section's.
    targets, last_blocks: linear layers that get adapters.  experts: what is added, or None.
    """

    name: str
    conversations: tuple[str, ...]
    course: OwnCourse | None
    targets: tuple[str, ...]
    last_blocks: int
    experts: Experts | None

    def __post_init__(self) -> None:
        if not self.conversations:
            raise ValueError(f"capability '{self.name}' has no 'conversations' to learn from")
        require_at_least(0, last_blocks=self.last_blocks)


@dataclass(frozen=True)
class Params(Course):
    """The section `sft` of params.yaml; comments and units stand there."""

    trainer: str
    capabilities: tuple[Capability, ...]
    rank: int
    alpha: float
    variant: str
    general_text: str
    heldout_rows: int

    def __post_init__(self) -> None:
        super().__post_init__()
        require_within(1, 1024, rank=self.rank)
        require_within(1e-3, 1e4, alpha=self.alpha)
        require_one_of(VARIANTS, variant=self.variant)
        require_at_least(2, heldout_rows=self.heldout_rows)
        names = [capability.name for capability in self.capabilities]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"'capabilities' are {names}; name at least one, each once")
        for capability in self.capabilities:
            try:
                self.course_of(capability)  # checked as the section itself is
            except ValueError as error:
                raise ValueError(f"capability '{capability.name}', 'course': {error}") from error
        require_one_of((OWN, TRL, UNSLOTH), trainer=self.trainer)
        if self.trainer != OWN:
            self._require_plain()

    def course_of(self, capability: Capability) -> Course:
        """How a capability is taught."""
        own = asdict(capability.course) if capability.course else {}
        return Course(**{f.name: getattr(self, f.name) for f in fields(Course)} | own)

    def _require_plain(self) -> None:
        """Refuse what only the own loop can do."""
        mixed = [capability.name for capability in self.capabilities if capability.experts]
        wrong = {
            "'packing' is true": self.packing,
            f"'experts' of {', '.join(mixed)} are to be trained": mixed,
            "'variant' is pissa, which changes the weights that unsloth opens": (
                self.trainer == UNSLOTH and self.variant == "pissa"
            ),
        }
        for what, is_so in wrong.items():
            if is_so:
                raise ValueError(
                    f"{what}, which trainer '{self.trainer}' does not do; change that, or set "
                    f"'trainer' to {OWN}"
                )


def check_among(sections: Mapping[str, Any]) -> None:
    """Refuse what other stages' parameters contradict, before anything runs."""
    for capability in sections["sft"].capabilities:
        require_prepared("sft", capability.conversations, sections)
    require_general_text("sft", sections)
    check_trainer(sections["sft"])


def check_trainer(params: Params) -> None:
    """Refuse a trainer that this machine does not have, naming what is missing."""
    if params.trainer == UNSLOTH:
        from modeling.backends import require

        require(UNSLOTH, f"sft.trainer '{UNSLOTH}'")
    if params.trainer != OWN and importlib.util.find_spec("trl") is None:
        raise ValueError(
            f"sft.trainer '{params.trainer}' needs TRL, which is not installed: "
            ".venv/bin/pip install -c constraints.txt trl, or set sft.trainer to own"
        )
