"""Look things up by name: teachers, students, datasets, benchmarks, tiers, capabilities.

    >>> from registry.catalog import lookup, names, select
    >>> lookup("teachers", "smollm2-135m").parameters
    134515008
    >>> select("datasets", "offline")
    ['python-docs', 'arithmetic']

A kind is a file beside this one: registry/KIND.yaml. Only facts live here; nothing of ours is
imported and no torch, so that a command line can list what exists without waiting.
"""

from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

from registry.capabilities import Capability, require_sound
from registry.records import Benchmark, Dataset, Student, Teacher, Tier
from registry.strict import read_entries

FOLDER = Path(__file__).resolve().parent

KINDS = {
    "teachers": Teacher,
    "students": Student,
    "datasets": Dataset,
    "benchmarks": Benchmark,
    "tiers": Tier,
    "capabilities": Capability,
}

Entry = Teacher | Student | Dataset | Benchmark | Tier | Capability


class UnknownName(ValueError):
    """A name that the registry does not have; the message gives near ones and all known ones."""

    def __init__(self, what: str, name: str, known: list[str], tags: list[str] | None = None):
        near = get_close_matches(name, [*known, *(tags or [])], n=3)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        tag_list = f". Known tags: {', '.join(tags)}, all" if tags is not None else ""
        super().__init__(f"unknown {what} {name!r}.{hint} Known: {', '.join(known)}{tag_list}")


def names(kind: str, folder: Path = FOLDER) -> list[str]:
    """List every name of a kind, in the order of its file.

    Raises UnknownName for a kind that is not in KINDS, BadEntry for a faulty file.
    """
    return list(_entries(kind, folder))


def lookup(kind: str, name: str, folder: Path = FOLDER) -> Entry:
    """Give the record of one name, e.g. lookup("teachers", "smollm2-135m").

    Raises UnknownName, whose message lists the near and the known names.
    """
    entries = _entries(kind, folder)
    if name not in entries:
        raise UnknownName(_one_of(kind), name, list(entries))
    return entries[name]


def select(kind: str, spec: str, folder: Path = FOLDER) -> list[str]:
    """Turn what a user typed into names: "a,b", a tag, "all", or any mixture with commas.

    The result has the order of the file and no duplicates, however the words were ordered.
    Raises UnknownName, which lists names and tags, for a word that is neither.
    """
    entries = _entries(kind, folder)
    tags = sorted({tag for entry in entries.values() for tag in _tags(entry)})
    words = {word.strip() for word in spec.split(",")}
    for word in sorted(words):
        if word != "all" and word not in entries and word not in tags:
            raise UnknownName(f"{_one_of(kind)} or tag", word, list(entries), tags)
    return [
        name
        for name, entry in entries.items()
        if "all" in words or name in words or not words.isdisjoint(_tags(entry))
    ]


@lru_cache
def _entries(kind: str, folder: Path) -> MappingProxyType[str, Entry]:
    """All records of a kind by name; read once a process, and read-only because it is shared."""
    if kind not in KINDS:
        raise UnknownName("kind", kind, list(KINDS))
    path = folder / f"{kind}.yaml"
    entries = read_entries(path, KINDS[kind])
    if kind == "capabilities":  # made of other kinds' entries
        require_sound(entries, _entries("datasets", folder), _entries("tiers", folder), path)
    return MappingProxyType(entries)


def _one_of(kind: str) -> str:
    """The singular of a kind: a capability, a tier."""
    return f"{kind[:-3]}y" if kind.endswith("ies") else kind.removesuffix("s")


def _tags(entry: Entry) -> tuple[str, ...]:
    return getattr(entry, "tags", ())  # students, tiers and capabilities have none
