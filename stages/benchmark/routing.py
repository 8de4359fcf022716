"""End to end: what choosing an adapter for each query is worth, beside choosing otherwise.

A reply is scored alike in all capabilities: the share of the right reply's tokens that the model
would have said, each after the right ones before it. Each held-out query is scored with every
adapter, so any way to choose one is a look into the same table, and all differences are paired.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from random import Random

import torch

from registry.catalog import lookup
from stages.benchmark.scoring import Estimate, estimate
from stages.formats.conversations import Conversation, read_conversations
from stages.measuring.statistics import sign_flip_p

ROUTED, ORACLE, ALONE, MERGED, ARROW = "routed", "oracle", "no adapter", "merged", "arrow"
ONLY = "only "  # an adapter's name behind it
MINILM = "minilm"  # measured by benchmarks/routed_replies.py alone
MEANINGS = {
    ROUTED: "the router's choice",
    ORACLE: "the adapter of the capability that the query is of",
    ALONE: "the student as it is",
    MERGED: "the mean of all adapters, for every query",
    ARROW: "PEFT's Arrow: three adapters a token and layer, by their singular vectors",
    MINILM: "the choice of logistic regression on MiniLM's embeddings",
}


@dataclass(frozen=True)
class RoutedQuery:
    """A query, the adapter chosen for it (None: abstained), and what each way makes of its reply.

    adapters: by name.  arrow: None where PEFT cannot build it of these adapters.
    """

    capability: str
    request: str
    chosen: str | None
    alone: float
    merged: float
    adapters: dict[str, float]
    arrow: float | None = None


@dataclass
class RoutingScores:
    """The queries so far; grows one by one, and can be saved half-way."""

    queries: list[RoutedQuery] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Write routing.json."""
        fields = [asdict(query) for query in self.queries]
        (folder / "routing.json").write_text(json.dumps(fields, indent=1), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""
        fields = json.loads((folder / "routing.json").read_text(encoding="utf-8"))
        self.queries = [RoutedQuery(**one) for one in fields]


def heldout_queries(
    prepared: Path, capabilities: Sequence[str], most: int
) -> list[tuple[str, Conversation]]:
    """Held-out requests with right replies, at most `most` a capability, in a fixed order."""
    found = []
    for capability in capabilities:
        names = lookup("capabilities", capability).conversations
        told = [one for name in names for one in read_conversations(prepared, name, "heldout")]
        chosen = Random(capability).sample(told, min(most, len(told)))
        found += [(capability, one) for one in chosen]
    return found


@dataclass(frozen=True)
class Way:
    """A way to choose adapters: the mean score, and how much better routing is on the same queries.

    p_value: of the difference, by flipping its signs; None for routing itself.
    """

    score: Estimate
    routed_gains: Estimate
    p_value: float | None


def ways(queries: Sequence[RoutedQuery]) -> dict[str, list[float]]:
    """The score of each query, by the way its adapter is chosen."""
    found = {
        ROUTED: [q.adapters.get(q.chosen or "", q.alone) for q in queries],
        ORACLE: [q.adapters.get(q.capability, q.alone) for q in queries],
        ALONE: [q.alone for q in queries],
        MERGED: [q.merged for q in queries],
    }
    arrow = [q.arrow for q in queries if q.arrow is not None]
    if len(arrow) == len(queries):
        found[ARROW] = arrow
    return found | {f"{ONLY}{n}": [q.adapters[n] for q in queries] for n in queries[0].adapters}


@dataclass(frozen=True)
class RoutingFound:
    """What was found.

    ways: over all queries.  capabilities: mean scores by capability of the query and way.
    without: what could not be compared, and why.
    """

    ways: dict[str, Way]
    capabilities: dict[str, dict[str, float]]
    without: dict[str, str] = field(default_factory=dict)


def assess_routing(
    queries: Sequence[RoutedQuery], resamples: int, seed: int, without: dict[str, str] | None = None
) -> RoutingFound:
    """Each way's mean score, and routing's gain over it."""
    found = ways(queries)
    compared = {name: compare(of, found[ROUTED], resamples, seed) for name, of in found.items()}
    compared[ROUTED] = replace(compared[ROUTED], p_value=None)
    return RoutingFound(compared, by_capability(queries), without or {})


def compare(scores: Sequence[float], routed: Sequence[float], resamples: int, seed: int) -> Way:
    """A way's scores beside routing's, query by query."""
    own, gains = torch.tensor(scores), torch.tensor(routed) - torch.tensor(scores)
    return Way(
        estimate(own, resamples, seed),
        estimate(gains, resamples, seed),
        sign_flip_p(gains.tolist(), seed),
    )


def by_capability(queries: Sequence[RoutedQuery]) -> dict[str, dict[str, float]]:
    """Mean scores: capability of the query -> way -> score."""
    groups: dict[str, list[RoutedQuery]] = {}
    for query in queries:
        groups.setdefault(query.capability, []).append(query)
    return {
        name: {way: sum(values) / len(values) for way, values in ways(group).items()}
        for name, group in groups.items()
    }


def flatten_routing(found: RoutingFound | None) -> dict[str, float]:
    """Flat metrics: routing.WAY, and routing.gain_over.WAY with its interval."""
    flat: dict[str, float] = {}
    for name, way in found.ways.items() if found else ():
        key = name.replace(" ", "_")
        flat[f"routing.{key}"] = round(way.score.value, 6)
        if way.p_value is not None:
            flat[f"routing.gain_over.{key}"] = round(way.routed_gains.value, 6)
            flat[f"routing.gain_over.{key}_low"] = round(way.routed_gains.low, 6)
            flat[f"routing.gain_over.{key}_high"] = round(way.routed_gains.high, 6)
    return flat


def routing_verdicts(found: RoutingFound) -> list[str]:
    """What the scores say, in sentences; whatever routing does not beat is named."""
    sentences = [
        "With an adapter chosen for each query the student names, on average over replies, "
        f"{found.ways[ROUTED].score.value:.1%} of the right reply's tokens first."
    ]
    for name, way in found.ways.items():
        if way.p_value is None:
            continue
        gain = way.routed_gains
        verdict = "better than" if gain.low > 0 else "WORSE than" if gain.high < 0 else "level with"
        sentences.append(
            f"That is {verdict} {meaning(name)} (difference {100 * gain.value:+.1f} points "
            f"[{100 * gain.low:+.1f}, {100 * gain.high:+.1f}], p = {way.p_value:.2g})."
        )
    return sentences + [f"Not compared: {what} ({why})." for what, why in found.without.items()]


def routing_table(ways: Mapping[str, Way]) -> list[str]:
    """Lines of a table of ways to choose an adapter, in Markdown."""
    lines = ["| adapter | score | routing gains | p |", "|---|---|---|---|"]
    for name, way in ways.items():
        cells = ["", ""]
        if way.p_value is not None:
            cells = [way.routed_gains.format(), f"{way.p_value:.2g}"]
        lines.append(f"| {meaning(name)} | {way.score.format()} | {' | '.join(cells)} |")
    return lines


def meaning(way: str) -> str:
    """A way in words."""
    return MEANINGS.get(way) or f"adapter {way.removeprefix(ONLY)} for every query"
