"""The queries that a router learns from and is measured on, with the capability that each wants.

Of a capability: the requests of its data sets (prepare), split as these are. Beside them, written
by hand: learnt_queries.yaml, and measured_queries.yaml, of which nothing is learnt.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from registry.catalog import lookup
from registry.strict import strict_yaml
from stages.formats.conversations import read_conversations

LEARNT = Path(__file__).with_name("learnt_queries.yaml")
MEASURED = Path(__file__).with_name("measured_queries.yaml")
NONE = None  # the capability of a query out of scope


@dataclass(frozen=True)
class Query:
    """What a user says, and the capability it wants; None for none of them."""

    text: str
    capability: str | None


@dataclass(frozen=True)
class QuerySets:
    """Queries to learn from, to calibrate with, and four sets that only measure.

    heldout: of templates, modules or wordings that training never shows, and of topics out of scope
    that it does not.  paraphrased: the capabilities, worded otherwise.  near: out of scope, but in
    the words of a capability.
    """

    train: list[Query]
    validation: list[Query]
    heldout: list[Query]
    paraphrased: list[Query]
    near: list[Query]

    @property
    def all(self) -> list[Query]:
        """Every query once, in a fixed order."""
        sets = (self.train, self.validation, self.heldout, self.paraphrased, self.near)
        return list(dict.fromkeys(query for part in sets for query in part))


def gather(
    prepared: Path, capabilities: Sequence[str], most: int, validation_share: float, seed: int
) -> QuerySets:
    """Collect the queries of some capabilities, at most `most` a capability and source."""
    learnt, measured = strict_yaml(LEARNT), strict_yaml(MEASURED)
    train, validation, heldout, paraphrased = [], [], [], []
    for name in capabilities:
        asked = _of(learnt["asked"].get(name, ()), name)
        for known in (_requests(prepared, name, "train", most, seed), _shuffled(asked, seed)):
            count = round(validation_share * len(known[:most]))
            validation += known[:count]
            train += known[count:most]
        heldout += _requests(prepared, name, "heldout", most, seed)
        paraphrased += _of(measured["paraphrased"].get(name, ()), name)[:most]
    outside = _of(learnt["other"], NONE) + _near(learnt, capabilities)
    outside = _shuffled(outside, seed)[: 2 * most]
    count = max(1, round(validation_share * len(outside)))
    validation += outside[:count]
    train += outside[count:]
    heldout += _of(measured["out_of_scope"], NONE)[:most]
    return QuerySets(train, validation, heldout, paraphrased, _near(measured, capabilities)[:most])


def _near(written: dict, capabilities: Sequence[str]) -> list[Query]:
    """What is out of scope, and yet in the words of some capabilities."""
    return [query for name in capabilities for query in _of(written["near"].get(name, ()), NONE)]


def _of(texts: Iterable[str], capability: str | None) -> list[Query]:
    return [Query(text, capability) for text in texts]


def _shuffled(queries: list[Query], seed: int) -> list[Query]:
    return Random(seed).sample(queries, len(queries))


def _requests(prepared: Path, capability: str, split: str, most: int, seed: int) -> list[Query]:
    """Requests of a capability's data sets, as many of each, in an order of the seed."""
    names = lookup("capabilities", capability).conversations
    found: list[Query] = []
    for name in names:
        texts = _unique(told.prompt for told in read_conversations(prepared, name, split))
        Random(f"{seed}/{name}/{split}").shuffle(texts)
        found += _of(texts[: max(1, most // len(names))], capability)
    return found


def _unique(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))
