"""What choosing adapters is worth, end to end: the router's choice beside every other way.

    .venv/bin/python benchmarks/routed_replies.py artifacts OUT [--queries 100] [--minilm FOLDER]

artifacts: with distill, prepare, route and sft, as the pipeline leaves them.  Held-out queries, at
most so many a capability, are scored as stage `benchmark` does (stages/benchmark/routing.py): the
share of the right reply's tokens that the model names first. The scores stay in OUT/routing.json,
so that a run that is stopped goes on from there: a folder for each set of artifacts.

    minilm   a way more: logistic regression on the embeddings of a folder with all-MiniLM-L6-v2,
             which learns from the queries that the router learnt from (params.yaml, route)

Printed: each way's mean score, what routing gains over it with the 95 % interval and the p-value of
the paired difference, and the scores by the capability of the queries.

Measured (laptop student of 24 blocks, six adapters of rank 16, 265 held-out queries; 16 minutes of
a shared core):

    way                   score   routing gains, points  tools devops code  docs  talk  german
    router                61.9 %                         98.4  30.3   70.8  43.2  46.3  46.1
    the right adapter     62.1    - 0.2 [- 0.4, 0.0]     98.4  30.3   70.8  43.7  47.2  46.1
    MiniLM's choice       61.6    + 0.3 [- 0.1, 0.8]
    Arrow                 54.7    + 7.2 [5.9, 8.8]       92.1  27.3   64.5  41.6  41.3  27.5
    mean of all adapters  49.3    + 12.7 [11.0, 14.6]    83.3  26.0   62.9  39.1  41.4  14.1
    the best single one   48.0    + 14.0 [12.2, 15.6]    translation; the others + 15 to 23
    none                  38.6    + 23.4 [21.4, 25.6]    59.2  22.6   57.5  29.2  37.3  7.3

The router chooses right 97.7 % of the time, MiniLM 95.8 %. All differences but the first two are
clear (p = 0.0001). 24 of the 60 replies of docs stand in the rows that the student was distilled
on; without all that do, router 63.9, right adapter 64.0, Arrow 56.1, none 39.7 %.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.clinc import embed, regress
from registry.strict import strict_yaml
from stages.benchmark.replies import RoutedStudent
from stages.benchmark.routing import (
    MINILM,
    ROUTED,
    RoutedQuery,
    RoutingScores,
    assess_routing,
    compare,
    heldout_queries,
    routing_table,
    ways,
)
from stages.route.queries import Query, gather

RESAMPLES, SEED, EVERY = 1000, 0, 10  # of intervals; queries between two writings


def main() -> None:
    """Score, assess, print tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifacts", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--queries", type=int, default=100, help="a capability at most (100)")
    parser.add_argument("--minilm", type=Path, help="a folder with all-MiniLM-L6-v2")
    options = parser.parse_args()
    torch.set_num_threads(1)
    artifacts = options.artifacts
    student = RoutedStudent(artifacts / "distill/student", artifacts / "route", artifacts / "sft")
    for what, reason in student.without.items():
        print(f"without {what}: {reason}")
    told = heldout_queries(artifacts / "prepare", student.capabilities, options.queries)
    queries = score(student, told, options.out)
    found = assess_routing(queries, RESAMPLES, SEED)
    compared = dict(found.ways)
    if options.minilm is not None:
        chosen = by_minilm(options.minilm, artifacts / "prepare", student.capabilities, queries)
        compared[MINILM] = compare(ways(chosen)[ROUTED], ways(queries)[ROUTED], RESAMPLES, SEED)
    print("\n".join(["", *routing_table(compared)]))
    if options.minilm is not None:
        print(f"\nMiniLM chooses right: {right(chosen):.1%}; the router: {right(queries):.1%}")
    print("\n| queries | " + " | ".join(found.ways) + " |\n" + "|---" * (len(found.ways) + 1) + "|")
    for name, scores in found.capabilities.items():
        print(f"| {name} | " + " | ".join(f"{value:.1%}" for value in scores.values()) + " |")


def score(student: RoutedStudent, told: list, out: Path) -> list[RoutedQuery]:
    """Score the queries; goes on from what is in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    scores = RoutingScores()
    if (out / "routing.json").exists():
        scores.load(out)
    stored = [(query.capability, query.request) for query in scores.queries]
    if stored != [(capability, one.prompt) for capability, one in told[: len(stored)]]:
        raise SystemExit(f"{out} holds scores of other queries; name another folder, or delete it")
    for capability, conversation in told[len(scores.queries) :]:
        scores.queries.append(student.score(capability, conversation))
        if len(scores.queries) % EVERY == 0 or len(scores.queries) == len(told):
            scores.save(out)
            print(f"scored {len(scores.queries)} of {len(told)} queries", flush=True)
    return scores.queries


def by_minilm(
    folder: Path, prepared: Path, capabilities: tuple[str, ...], queries: list[RoutedQuery]
) -> list[RoutedQuery]:
    """The same queries, with the choices of a regression on sentence embeddings."""
    route = strict_yaml(Path("params.yaml"))["route"]
    known = gather(
        prepared, capabilities, route["queries"], route["validation_share"], route["seed"]
    )
    classes: list[str | None] = [*capabilities, None]
    parts = [known.train, known.validation, [Query(q.request, q.capability) for q in queries]]
    embedded = [embed(folder, [query.text for query in part]) for part in parts]
    labels = [torch.tensor([classes.index(q.capability) for q in part]) for part in parts[:2]]
    found = regress(*embedded, *labels).argmax(-1).tolist()
    return [replace(q, chosen=classes[place]) for q, place in zip(queries, found, strict=True)]


def right(queries: list[RoutedQuery]) -> float:
    """How many queries got the capability that they are of."""
    return sum(query.chosen == query.capability for query in queries) / len(queries)


if __name__ == "__main__":
    main()
