"""Adapters of one model, as many in memory as a budget of bytes allows; the others on disk.

    bank = AdapterBank(model, budget_bytes=256 << 20)
    bank.add("arithmetic", folder)          # checked against the model and read, while serving
    held = bank.take(["arithmetic"])        # what the engine does: name -> Adapter
    bank.remove("arithmetic")
    bank.listing()

The one used longest ago makes room first, and is read from its folder again when it is asked for.

What is promised to threads: each call is whole, as if the others came before or behind it; one lock
is held meanwhile, for the reading of a folder too, so a call waits at most for another's reads.
What was taken stays usable, and the same, for as long as who took it keeps it, though it is removed
or makes room: the budget bounds what the bank holds, and what a batch still uses of those that went
comes on top until it ends.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from transformers import PreTrainedModel

from runtime.adapters.folder import Adapter, inspect_adapter, layer_sizes


class AdaptersTooLarge(ValueError):
    """Adapters do not fit into the budget, with all others out of the way."""


class UnknownAdapter(KeyError):
    """There is no adapter of this name."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would show it quoted


@dataclass(frozen=True)
class AdapterState:
    """What is known of one adapter."""

    name: str
    folder: Path
    bytes: int  # of its tensors in memory
    rank: int  # the largest of any layer
    loaded: bool
    last_use: float | None  # seconds since the epoch; None before it was first taken
    hits: int  # how often it was taken and was there
    reads: int  # of its folder


@dataclass
class _Entry:
    folder: Path
    bytes: int
    rank: int
    adapter: Adapter | None = None
    last_use: float | None = None
    hits: int = 0
    reads: int = 0


class AdapterBank:
    """Holds adapters of one model."""

    def __init__(self, model: PreTrainedModel, budget_bytes: int) -> None:
        """Raises ValueError for a model that carries adapters itself."""
        if budget_bytes < 1:
            raise ValueError(f"budget_bytes is {budget_bytes}; it must be above 0")
        self.model, self.budget_bytes = model, budget_bytes
        self._sizes = layer_sizes(model)
        self._entries: dict[str, _Entry] = {}  # the one used longest ago is the first
        self._lock = Lock()

    def add(self, name: str, folder: Path) -> None:
        """Check an adapter against the model and read it; others may make room for it.

        Raises what `inspect_adapter` does, ValueError for a name that is taken, AdaptersTooLarge
        for an adapter that is larger than the budget.
        """
        with self._lock:
            if name in self._entries:
                raise ValueError(
                    f"there is an adapter '{name}' already, from {self._entries[name].folder}; "
                    "remove it first"
                )
            self._load(name, _Entry(folder, bytes=0, rank=0), keeping=set())

    def remove(self, name: str) -> None:
        """Forget an adapter; its folder stays. Raises UnknownAdapter."""
        with self._lock:
            self._entry(name)
            del self._entries[name]

    def take(self, names: Iterable[str]) -> dict[str, Adapter]:
        """Adapters to use together, all in memory; those that are not are read.

        Raises UnknownAdapter before anything is read, AdaptersTooLarge when they do not fit
        together, and what `inspect_adapter` does for a folder that has changed meanwhile.
        """
        wanted = dict.fromkeys(names)
        with self._lock:
            for name in wanted:
                self._entry(name)
            return self._take(wanted)

    def take_known(self, names: Iterable[str]) -> dict[str, Adapter]:
        """As `take`, of those names alone that there are adapters of."""
        with self._lock:
            return self._take({name: None for name in sorted(names) if name in self._entries})

    def listing(self) -> list[AdapterState]:
        """All adapters, by name."""
        with self._lock:
            return [
                AdapterState(
                    name, e.folder, e.bytes, e.rank, e.adapter is not None, e.last_use, e.hits,
                    e.reads,
                )
                for name, e in sorted(self._entries.items())
            ]  # fmt: skip

    @property
    def loaded_bytes(self) -> int:
        """What the adapters in memory take."""
        with self._lock:
            return self._loaded_bytes()

    # --- with the lock held ------------------------------------------------------------------

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            known = ", ".join(sorted(self._entries)) or "none"
            raise UnknownAdapter(f"there is no adapter '{name}'; there are: {known}")
        return self._entries[name]

    def _take(self, wanted: dict[str, None]) -> dict[str, Adapter]:
        self._refuse_more_than_budget(wanted)
        taken = {}
        for name in wanted:
            entry = self._entries.pop(name)
            self._entries[name] = entry  # the last one: used most recently
            if entry.adapter is None:
                self._load(name, entry, keeping=set(wanted))
            else:
                entry.hits += 1
            entry.last_use = time.time()
            taken[name] = entry.adapter
        return taken

    def _load(self, name: str, entry: _Entry, keeping: set[str]) -> None:
        """Read an entry's folder, after others but those to keep have made room for it."""
        found = inspect_adapter(entry.folder, self._sizes)
        size = found.bytes_as(self.model.dtype)
        for other in [n for n in self._entries if n not in keeping]:
            if self._loaded_bytes() + size <= self.budget_bytes or size > self.budget_bytes:
                break
            self._entries[other].adapter = None
        if self._loaded_bytes() + size > self.budget_bytes:
            raise AdaptersTooLarge(
                f"adapter '{name}' takes {size:,} bytes, and the budget for all is "
                f"{self.budget_bytes:,}"
                + (f", of which {self._loaded_bytes():,} are in use with it" if keeping else "")
            )
        entry.adapter = found.read(self.model.dtype, self.model.device)
        entry.bytes, entry.rank = size, found.rank
        entry.reads += 1
        self._entries[name] = entry

    def _loaded_bytes(self) -> int:
        return sum(entry.bytes for entry in self._entries.values() if entry.adapter is not None)

    def _refuse_more_than_budget(self, names: Iterable[str]) -> None:
        total = sum(self._entries[name].bytes for name in names)
        if total > self.budget_bytes:
            raise AdaptersTooLarge(
                f"adapters {', '.join(names)} take {total:,} bytes together, and the budget is "
                f"{self.budget_bytes:,}; answer fewer of them at once"
            )
