"""What can be set of toolformer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stages.agreement import (
    require_capability,
    require_general_text,
    require_prepared,
    require_probes,
)
from stages.learning.course import Course
from stages.params import require_at_least, require_within


@dataclass(frozen=True)
class Params(Course):
    """The section `toolformer` of params.yaml; comments and units stand there."""

    capability: str
    conversations: tuple[str, ...]
    texts: tuple[str, ...]
    most_texts: int
    tools: tuple[str, ...]
    places: int
    place_probability: float
    tries: int
    following_tokens: int
    threshold: float
    probe_problems: int
    general_text: str
    heldout_rows: int

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(
            1, most_texts=self.most_texts, places=self.places, tries=self.tries,
            following_tokens=self.following_tokens, probe_problems=self.probe_problems,
        )  # fmt: skip
        require_at_least(2, heldout_rows=self.heldout_rows)
        require_within(0.0, 1.0, place_probability=self.place_probability)
        require_within(-100.0, 100.0, threshold=self.threshold)
        for name in ("conversations", "texts", "tools"):
            if not getattr(self, name):
                raise ValueError(f"'{name}' is empty; name at least one")


def check_among(sections: Mapping[str, Any]) -> None:
    """Refuse what other stages' parameters contradict, before anything runs."""
    own = sections["toolformer"]
    require_prepared("toolformer", (*own.conversations, *own.texts), sections)
    require_capability("toolformer", sections)
    require_probes("toolformer", sections)
    require_general_text("toolformer", sections)
