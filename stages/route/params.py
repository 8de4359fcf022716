"""What can be set of route."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stages.params import require_at_least, require_within


@dataclass(frozen=True)
class Params:
    """The section `route` of params.yaml; comments and units stand there."""

    capabilities: tuple[str, ...]
    queries: int
    blocks: tuple[int, ...]
    hidden: int
    steps: int
    batch_queries: int
    learning_rate: float
    weight_decay: float
    z_loss: float
    diversity: float
    confidence: float
    validation_share: float
    answered: float
    seed: int

    def __post_init__(self) -> None:
        require_at_least(
            1, queries=self.queries, hidden=self.hidden, steps=self.steps,
            batch_queries=self.batch_queries,
        )  # fmt: skip
        require_at_least(0, seed=self.seed, weight_decay=self.weight_decay, z_loss=self.z_loss)
        require_at_least(0, diversity=self.diversity, confidence=self.confidence)
        require_within(1e-8, 1.0, learning_rate=self.learning_rate)
        require_within(0.05, 0.5, validation_share=self.validation_share)
        require_within(0.5, 1.0, answered=self.answered)
        if len(self.capabilities) < 2 or len(set(self.capabilities)) < len(self.capabilities):
            raise ValueError(
                f"'capabilities' is {list(self.capabilities)}; name two or more, each once"
            )
        if not self.blocks or sorted(set(self.blocks)) != list(self.blocks) or self.blocks[0] < 1:
            raise ValueError(
                f"'blocks' is {list(self.blocks)}; name blocks from 1 on, ascending, each once"
            )


def check_among(sections: Mapping[str, Any]) -> None:
    """Refuse what other stages' parameters contradict, before anything runs."""
    from registry.catalog import lookup
    from stages.agreement import require_prepared

    own = sections["route"]
    for name in own.capabilities:
        require_prepared("route", lookup("capabilities", name).conversations, sections)
