"""Problems with known answers: those that are learnt from, and those that are only measured with.

Held-out conversations come from templates that nothing is trained on. Of these templates every
second one is for decisions that a stage makes (probes), the others for the benchmark, so that no
decision is made by what is reported.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stages.formats.conversations import Conversation, read_conversations
from stages.learning.finetuning import draw

STREAM = 2  # of random numbers: another order than that of conversations and rows


@dataclass(frozen=True)
class Problems:
    """To learn from; and to probe with, never learnt from."""

    known: list[Conversation]
    probes: list[Conversation]

    def draw(self, step: int, count: int, seed: int) -> list[Conversation]:
        """The problems of a step: each once an epoch, in an order of its own."""
        places = range(step * count, (step + 1) * count)
        return [self.known[index] for index in draw(places, len(self.known), (seed, STREAM))]


def open_problems(prepared: Path, names: Sequence[str], probes: int) -> Problems:
    """Read problems of data sets.

    Raises ValueError where too few have a known answer.
    """
    known = _with_answers(prepared, names, "train")
    held_out = [one for one in _with_answers(prepared, names, "heldout") if is_probe(one)]
    if not known or len(held_out) < probes:
        raise ValueError(
            f"{', '.join(names)}: {len(known)} problems to learn from and {len(held_out)} probes "
            f"have a known answer, of which {probes} are wanted; raise "
            "prepare.heldout_conversations or lower 'probe_problems'"
        )
    return Problems(known, held_out[:probes])


def benchmark_problems(prepared: Path, names: Sequence[str]) -> list[Conversation]:
    """Held-out problems that no stage has decided anything by.

    Raises ValueError where there are none.
    """
    found = [one for one in _with_answers(prepared, names, "heldout") if not is_probe(one)]
    if not found:
        raise ValueError(
            f"{', '.join(names)}: no held-out problem has a known answer and a template that "
            "nothing is decided by; raise prepare.heldout_conversations, or name other data sets"
        )
    return found


def is_probe(problem: Conversation) -> bool:
    """Whether a held-out problem's template is one for decisions."""
    return int(problem.facts.get("template", 0)) % 2 == 0


def _with_answers(prepared: Path, names: Sequence[str], split: str) -> list[Conversation]:
    return [
        one
        for name in names
        for one in read_conversations(prepared, name, split)
        if one.answer is not None
    ]
