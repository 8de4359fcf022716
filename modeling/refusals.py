"""Models that stream to the bit, but are no teachers here: their states are not one vector a token.

Nothing of this is known from a configuration; it shows at the first arrivals of a passage, before
anything was computed that would be lost.
"""

from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from modeling.streaming import Arrival, Passage


class CannotFollow(ValueError):
    """A model whose states or answers are not one a token, or cannot be told; it is named."""


def refuse_unusual(passage: "Passage", arrival: "Arrival") -> None:
    """Raise CannotFollow unless a state is one vector a token, (B, T, D)."""
    config = passage.model.config.get_text_config()
    tokens = tuple(passage.forwards[arrival.batch].inputs["input_ids"].shape)
    found, width = tuple(arrival.hidden.shape), getattr(config, "hidden_size", None)
    if found != (*tokens, width):
        raise CannotFollow(
            f"a {config.model_type} cannot be a teacher: its states are {found} for tokens "
            f"{tokens}, not one vector of its width ({width}) a token; take another"
        )


def refuse_unlike(passage: "Passage") -> None:
    """Raise CannotFollow where no block can be left out, because each gives something else."""
    if not all(forward.alike for forward in passage.forwards):
        kinds = ", ".join(dict.fromkeys(type(block).__name__ for block in passage.blocks))
        raise CannotFollow(
            f"the blocks of {type(passage.model).__name__} ({kinds}) do not all return the same "
            "kind of thing, so what it does behind its head cannot be told; take another teacher"
        )


def count_visits(passage: "Passage", wanted: Collection[int]) -> int:
    """How many blocks a batch comes to; a model may come to one twice, or never.

    To be called while the passage runs, when a batch is behind a block. Raises CannotFollow where
    a block of which something is wanted is not come to.
    """
    visits = passage.visits()
    if unseen := sorted(set(wanted).difference(visits)):
        raise CannotFollow(
            f"{type(passage.model).__name__} passes by block {unseen[0]} when it reads text alone, "
            "so there is nothing of it to keep; take another teacher"
        )
    return len(visits)
