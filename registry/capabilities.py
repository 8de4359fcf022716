"""The record of a capability, and what the other files have to hold for it to make sense."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from registry.records import Dataset
from registry.strict import BadEntry


@dataclass(frozen=True)
class Capability:
    """A skill that a router can choose: what shows it, and what its adapter may cost.

    conversations: names of data sets of conversations, at least one.
    tier: name of the tier whose memory and rank its adapter keeps within.
    """

    name: str
    conversations: tuple[str, ...]
    tier: str
    description: str

    def __post_init__(self) -> None:
        if not self.conversations or len(set(self.conversations)) < len(self.conversations):
            raise ValueError(
                f"field 'conversations' is {list(self.conversations)}; name at least one data set, "
                "each once"
            )


def require_sound(
    capabilities: Mapping[str, Capability],
    datasets: Mapping[str, Dataset],
    tiers: Collection[str],
    path: Path,
) -> None:
    """Refuse data sets and tiers that do not exist, and a data set of two capabilities.

    path: the file of the capabilities, for messages. Raises BadEntry, naming entry and field.
    """
    skills = [name for name, entry in datasets.items() if entry.teaches_by_conversations]
    owner: dict[str, str] = {}
    for name, entry in capabilities.items():
        where = f"{path}, entry '{name}', field"
        for told in entry.conversations:
            if told not in skills:
                raise BadEntry(
                    f"{where} 'conversations': no data set of conversations is called "
                    f"'{told}'.{_hint(told, skills)} Known: {', '.join(skills)}"
                )
            if told in owner:
                raise BadEntry(
                    f"{where} 'conversations': '{told}' is also of '{owner[told]}', and nothing "
                    "could tell the two apart; keep it in one of them"
                )
            owner[told] = name
        if entry.tier not in tiers:
            raise BadEntry(
                f"{where} 'tier': unknown tier '{entry.tier}'.{_hint(entry.tier, tiers)} "
                f"Known: {', '.join(tiers)}"
            )


def _hint(word: str, known: Collection[str]) -> str:
    near = get_close_matches(word, known)
    return f" Did you mean {' or '.join(near)}?" if near else ""
