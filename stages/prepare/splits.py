"""Which conversations train, and which are held out to measure with: by hashes, never by order."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, TypeVar

from stages.formats.conversations import Conversation

HELD_OUT = 10  # one in so many

Item = TypeVar("Item")


@dataclass(frozen=True)
class Wanted:
    """How many conversations of each split at most, and the seed of what is drawn."""

    train: int
    heldout: int
    seed: int


Made = tuple[list[Conversation], list[Conversation]]  # train, held out
Rows = Iterable[dict[str, Any]]  # of the hub; empty for what is made here


def digest(text: str) -> str:
    """A text's SHA-256, 64 hex digits: the same in every process and on every machine."""
    return sha256(text.encode()).hexdigest()


def hold_out(conversations: list[Conversation], wanted: Wanted) -> Made:
    """Hold out a tenth, or fewer where fewer are wanted, by a hash of the request and the seed."""
    return hold_out_by(lambda told: told.prompt, conversations, wanted)


def hold_out_by(
    key: Callable[[Item], str], items: Iterable[Item], wanted: Wanted
) -> tuple[list[Item], list[Item]]:
    """The same of anything that has a text to go by: (train, held out), in an order of hashes."""
    order = shuffled(key, items, wanted.seed)
    held = min(wanted.heldout, len(order) // HELD_OUT)
    return order[held : held + wanted.train], order[:held]


def hold_out_groups(
    group: Callable[[Item], str], items: Iterable[Item], wanted: Wanted
) -> tuple[list[Item], list[Item]]:
    """Hold out whole groups, about a tenth of them: no group is on both sides, whatever is wanted.

    A group's side depends on its name and the seed alone, so that two data sets over the same
    groups hold out the same ones.
    """
    train, heldout = [], []
    for item in items:
        drawn = int(digest(f"{wanted.seed}/{group(item)}"), 16)
        (train if drawn % HELD_OUT else heldout).append(item)
    return train, heldout


def shuffled(key: Callable[[Item], str], items: Iterable[Item], seed: int) -> list[Item]:
    """The items in an order that depends on their keys and the seed alone."""
    return sorted(items, key=lambda item: digest(f"{seed}/{key(item)}"))
