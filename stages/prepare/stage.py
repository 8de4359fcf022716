"""Prepare: documents in, clean token rows out.

Steps:
  1. read every data set and every benchmark in use (Python packages, generators or the hub)
  2. drop exact duplicates, repeated paragraphs and near duplicates
  3. drop documents that share 13 words in a row with a benchmark
  4. split by document into train, calibration and held-out
  5. tokenise and pack into rows

reads    registry/datasets.yaml, registry/benchmarks.yaml
writes   tokens/SPLIT/SOURCE.npy, documents.jsonl (see stages/formats/tokens.py)
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from registry.catalog import lookup
from stages.contract import Job, Metrics, Stage
from stages.params import require_at_least, require_within


@dataclass(frozen=True)
class Params:
    """The section `prepare` of params.yaml; comments and units stand there."""

    datasets: tuple[str, ...]
    benchmarks: tuple[str, ...]
    tokenizer: str
    sample_size: int
    row_tokens: int
    near_duplicate: float
    heldout_share: float
    calibration_share: float
    train_rows: int
    calibration_rows: int
    heldout_rows: int
    seed: int

    def __post_init__(self) -> None:
        require_at_least(0, sample_size=self.sample_size, seed=self.seed)
        require_at_least(16, row_tokens=self.row_tokens)
        require_at_least(
            1, train_rows=self.train_rows, calibration_rows=self.calibration_rows,
            heldout_rows=self.heldout_rows,
        )  # fmt: skip
        require_within(0.3, 0.95, near_duplicate=self.near_duplicate)
        require_within(0.01, 0.4, heldout_share=self.heldout_share)
        require_within(0.01, 0.4, calibration_share=self.calibration_share)
        for name in self.datasets:
            if lookup("datasets", name).modality != "text":
                raise ValueError(f"dataset '{name}' is not text; only text can be prepared so far")
        for name in self.benchmarks:
            lookup("benchmarks", name)
        lookup("teachers", self.tokenizer)


def run(params: Params, job: Job) -> Metrics:
    """Read, clean, split, pack; see the module's steps."""
    from modeling.loading import locate, open_tokenizer
    from stages.formats.tokens import write_documents, write_rows
    from stages.prepare.clean import (
        Document,
        drop_contaminated,
        drop_exact_duplicates,
        drop_near_duplicates,
        drop_repeated_paragraphs,
        shared_share,
    )
    from stages.prepare.pack import pack_rows, split_of

    collected = collect(params, job)
    benchmarks = [doc for name in params.benchmarks for doc in collected["benchmarks"][name]]
    raw = [doc for name in params.datasets for doc in collected["datasets"][name]]
    unique = drop_exact_duplicates(raw)
    distinct = drop_near_duplicates(drop_repeated_paragraphs(unique), params.near_duplicate)
    clean, contaminated = drop_contaminated(distinct, benchmarks)

    splits: dict[str, list] = {
        "train": [],
        "calibration": [],
        "heldout": [],
        "benchmark": benchmarks,
    }
    for document in clean:
        shares = params.heldout_share, params.calibration_share
        splits[split_of(document, *shares, params.seed)].append(document)

    def of(source: str, split: str) -> list[Document]:
        return [document for document in splits[split] if document.source == source]

    tokenizer = open_tokenizer(locate(params.tokenizer))
    limits = {"train": params.train_rows, "calibration": params.calibration_rows}
    metrics: Metrics = {
        "documents_read": len(raw),
        "exact_duplicates": len(raw) - len(unique),
        "near_duplicates": len(unique) - len(distinct),
        **{
            f"heldout_shared_13grams_{name}": round(
                shared_share(of(name, "heldout"), of(name, "train")), 5
            )
            for name in params.datasets
        },
        **{f"contaminated_{name}": count for name, count in contaminated.items()},
    }
    for split, documents in splits.items():
        sources = list(dict.fromkeys(document.source for document in documents))
        limit = limits.get(split, params.heldout_rows)
        packed = {
            source: pack_rows(
                [doc for doc in documents if doc.source == source],
                tokenizer,
                params.row_tokens,
                params.seed,
            )  # fmt: skip
            for source in sources
        }
        kept = share_rows(packed, limit) if split in limits else limit_rows(packed, limit)
        for source, rows in kept.items():
            if not len(rows):
                raise ValueError(
                    f"split '{split}' got no row of {params.row_tokens} tokens from '{source}'; "
                    "raise prepare.sample_size or take more data sets"
                )
            write_rows(job.output, split, source, rows)
        metrics[f"{split}_tokens"] = sum(rows.size for rows in kept.values())
    write_documents(
        job.output,
        ({"split": s, "source": d.source, "id": d.id, "text": d.text} for s in splits for d in splits[s]),
    )  # fmt: skip
    return metrics


def share_rows(packed: dict, limit: int) -> dict:
    """Take at most `limit` rows in all: one of each source, the rest in proportion to their sizes."""
    spare = sum(len(rows) - 1 for rows in packed.values())
    share = min(1.0, (limit - len(packed)) / max(spare, 1))
    return {
        source: rows[: 1 + int((len(rows) - 1) * share)] if share >= 0 else rows[:0]
        for source, rows in packed.items()
    }


def limit_rows(packed: dict, limit: int) -> dict:
    """Take at most `limit` rows of each source."""
    return {source: rows[:limit] for source, rows in packed.items()}


@dataclass
class Collected:
    """Documents read so far, by kind and registry name; what an interrupted download keeps."""

    documents: dict[str, dict[str, list]] = field(
        default_factory=lambda: {"datasets": {}, "benchmarks": {}}
    )

    def save(self, folder: Path) -> None:
        """Write documents.json."""
        (folder / "documents.json").write_text(json.dumps(self.documents), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""
        self.documents = json.loads((folder / "documents.json").read_text(encoding="utf-8"))


def collect(params: Params, job: Job) -> dict[str, dict[str, list]]:
    """Read all sources, one step each, so that a lost network costs one source at most."""
    from stages.prepare.clean import Document
    from stages.prepare.sources import read_documents

    wanted = [("datasets", name) for name in params.datasets]
    wanted += [("benchmarks", name) for name in params.benchmarks]
    state = job.resume(Collected(), "read")
    for step, (kind, name) in enumerate(wanted, start=1):
        if name in state.documents[kind]:
            continue
        limit = params.sample_size if kind == "datasets" else 0
        state.documents[kind][name] = read_documents(lookup(kind, name), limit, params.seed)
        job.step_done(state, step, len(wanted), "read", documents=len(state.documents[kind][name]))
    return {
        kind: {name: [Document(name, *pair) for pair in pairs] for name, pairs in entries.items()}
        for kind, entries in state.documents.items()
    }


STAGE = Stage("prepare", Params, run)
