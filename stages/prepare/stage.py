"""Prepare: documents in, clean token rows and conversations out.

Steps:
  1. read every data set and every benchmark in use (Python packages, generators or the hub)
  2. drop exact duplicates, repeated paragraphs and near duplicates
  3. drop documents that share 13 words in a row with a benchmark
  4. split by document into train, calibration and held-out
  5. tokenise and pack into rows
  6. make conversations that teach skills, and drop what is measured with (see skills.py)

reads    registry/datasets.yaml, registry/benchmarks.yaml
writes   tokens/SPLIT/SOURCE.npy, documents.jsonl (see stages/formats/tokens.py)
         conversations/NAME.SPLIT.jsonl (see stages/formats/conversations.py)
"""

from dataclasses import dataclass

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
    conversations: tuple[str, ...]
    train_conversations: int
    heldout_conversations: int
    number_masking: bool
    seed: int

    def __post_init__(self) -> None:
        require_at_least(0, sample_size=self.sample_size, seed=self.seed)
        require_at_least(16, row_tokens=self.row_tokens)
        require_at_least(
            1, train_rows=self.train_rows, calibration_rows=self.calibration_rows,
            heldout_rows=self.heldout_rows, train_conversations=self.train_conversations,
            heldout_conversations=self.heldout_conversations,
        )  # fmt: skip
        require_within(0.3, 0.95, near_duplicate=self.near_duplicate)
        require_within(0.01, 0.4, heldout_share=self.heldout_share)
        require_within(0.01, 0.4, calibration_share=self.calibration_share)
        for name in self.datasets:
            entry = lookup("datasets", name)
            if entry.modality != "text":
                raise ValueError(f"dataset '{name}' is not text; only text can be prepared so far")
            if entry.teaches_by_conversations:
                raise ValueError(
                    f"dataset '{name}' is of conversations; name it in 'conversations'"
                )
        for name in self.conversations:
            if not lookup("datasets", name).teaches_by_conversations:
                raise ValueError(f"dataset '{name}' has no conversations; name it in 'datasets'")
        for name in self.benchmarks:
            lookup("benchmarks", name)
        lookup("teachers", self.tokenizer)


def run(params: Params, job: Job) -> Metrics:
    """Read, clean, split, pack; see the module's steps."""
    from modeling.loading import locate, open_tokenizer
    from stages.formats.tokens import write_documents, write_rows, write_tokenizer
    from stages.prepare.clean import clean, shared_shares
    from stages.prepare.collect import collect
    from stages.prepare.pack import pack_split, split_documents
    from stages.prepare.skills import Wanted, prepare_skill

    raw, benchmarks = collect(
        params.datasets, params.benchmarks, params.sample_size, params.seed, job
    )
    documents, counts = clean(raw, benchmarks, params.near_duplicate)
    splits = split_documents(
        documents, params.heldout_share, params.calibration_share, params.seed
    ) | {"benchmark": benchmarks}

    tokenizer = open_tokenizer(locate(params.tokenizer))
    limits = {"train": params.train_rows, "calibration": params.calibration_rows}
    metrics: Metrics = {**counts, **shared_shares(splits["heldout"], splits["train"])}
    for split, members in splits.items():
        packed = pack_split(members, tokenizer, params.row_tokens, params.seed)
        limit = limits.get(split)
        kept = share_rows(packed, limit) if limit else limit_rows(packed, params.heldout_rows)
        if not kept:
            raise ValueError(
                f"split '{split}' got no row of {params.row_tokens} tokens; raise "
                "prepare.sample_size or take more data sets"
            )
        for source, rows in kept.items():
            write_rows(job.output, split, source, rows)
        metrics[f"{split}_tokens"] = sum(rows.size for rows in kept.values())
    write_documents(job.output, splits)
    write_tokenizer(job.output, params.tokenizer, tokenizer)
    wanted = Wanted(params.train_conversations, params.heldout_conversations, params.seed)
    for name in params.conversations:
        metrics |= prepare_skill(name, wanted, params.number_masking, benchmarks, job)
    return metrics


def share_rows(packed: dict, limit: int) -> dict:
    """Take at most `limit` rows in all: one of each source, the rest in proportion to sizes."""
    spare = sum(len(rows) - 1 for rows in packed.values())
    more = min(spare, limit - len(packed))
    if more < 0:
        raise ValueError(f"{limit} rows cannot hold one of each of {len(packed)} data sets")
    return {
        source: rows[: 1 + (len(rows) - 1) * more // max(spare, 1)]
        for source, rows in packed.items()
    }


def limit_rows(packed: dict, limit: int) -> dict:
    """Take at most `limit` rows of each source."""
    return {source: rows[:limit] for source, rows in packed.items()}


STAGE = Stage("prepare", Params, run)
