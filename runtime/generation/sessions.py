"""What the engine needs of a model that decodes: rows that take tokens and give logits.

There are two: `PackedSession` for models like Llama on a CPU, `CachedSession` for all others.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from modeling.router import Decision
from runtime.adapters.rows import Mix


class Session(ABC):
    """Some prompts with the same number of candidates each, in the middle of being decoded.

    A row is a candidate. Rows are in the order of the prompts, those of a prompt side by side,
    until `drop` says otherwise.
    """

    most_at_once: int  # tokens that a row may take in one step; more of them wait

    def __init__(self, waiting: list[list[int]], mixes: Sequence[Mix] | None = None) -> None:
        """waiting: tokens that each row has yet to take. mixes: of adapters, one a row."""
        self._waiting = waiting
        self._mixes = None if mixes is None else list(mixes)
        self.decisions: list[Decision] = []  # of a router, one a prompt

    def start(self) -> tuple[list[int], Tensor]:
        """The rows whose prompt is read, and the logits of what follows it, in that order."""
        ready = self._ready()
        return ready, self._first_logits(ready)

    def step(self, tokens: list[list[int]]) -> tuple[list[int], Tensor]:
        """Feed every row that was ready at least one token, and the others none.

        Returns the rows that have taken all of theirs, and the logits of what follows, in that
        order: (rows, V). The others take more of theirs in the next step.
        """
        for waiting, new in zip(self._waiting, tokens, strict=True):
            waiting.extend(new)
        taken = [waiting[: self.most_at_once] for waiting in self._waiting]
        self._waiting = [waiting[self.most_at_once :] for waiting in self._waiting]
        ready = self._ready()
        return ready, self._feed(taken, ready)

    def drop(self, places: list[int]) -> list[int]:
        """Forget rows. Returns, for each row that is left, in which place it was before."""
        order = self._forget(set(places))
        self._waiting = [self._waiting[place] for place in order]
        if self._mixes is not None:
            self._mixes = [self._mixes[place] for place in order]
        return order

    def _ready(self) -> list[int]:
        return [place for place, waiting in enumerate(self._waiting) if not waiting]

    @abstractmethod
    def _first_logits(self, ready: list[int]) -> Tensor:
        """The logits behind the prompts of some rows: (rows, V)."""

    @abstractmethod
    def _feed(self, tokens: list[list[int]], ready: list[int]) -> Tensor:
        """Take each row's tokens; the logits behind the last one of the rows that are ready."""

    @abstractmethod
    def _forget(self, places: set[int]) -> list[int]:
        """Free what belongs to rows; the places of the others, in the order that they now have."""


def of_rows(mixes: Sequence[Mix], candidates: int) -> list[Mix]:
    """Each row's mix, from those of the prompts."""
    return [mix for mix in mixes for _ in range(candidates)]
