"""The manifest of capabilities: what each adapter is, costs and is worth.

Written for people and programs alike: --status, the API and the model card show it.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from registry.catalog import lookup
from runtime.adapters.bank import AdapterState
from stages.benchmark.routing import RoutedQuery

FILE, STAGE = "capabilities.json", "sft"


def describe(
    names: Sequence[str],
    adapters: Mapping[str, AdapterState],
    queries: Sequence[RoutedQuery],
    teacher: str,
) -> list[dict]:
    """One record a capability that the router knows.

    rank and bytes are None where there is no adapter: the student answers such queries as it is.
    stage: whose adapter it is; a later one may have taught it more.  score, score_routed,
    score_alone: mean shares of the right replies' tokens (stages/benchmark/routing.py) with its own
    adapter, the one that the router chooses, and none; None where nothing was measured.
    """
    records = []
    for name in names:
        entry, adapter = lookup("capabilities", name), adapters.get(name)
        own = [query for query in queries if query.capability == name]
        records.append(
            {
                "name": name,
                "description": entry.description,
                "tier": entry.tier,
                "rank": adapter and adapter.rank,
                "bytes": adapter and adapter.bytes,
                "stage": adapter and STAGE,
                "queries": len(own),
                "score": _mean([q.adapters.get(name, q.alone) for q in own]),
                "score_routed": _mean([q.adapters.get(q.chosen or "", q.alone) for q in own]),
                "score_alone": _mean([q.alone for q in own]),
                "teacher": teacher,
            }
        )
    return records


def _mean(values: list[float]) -> float | None:
    return round(fmean(values), 6) if values else None


def write_capabilities(records: list[dict], folder: Path) -> None:
    """Write capabilities.json."""
    (folder / FILE).write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
