"""Teacher targets: what `extract` keeps of a teacher's answers, in checksummed shards.

    targets.json                what the shards hold (see Header) and the checksum of each file
    answers-00000.safetensors   R rows of T tokens:
        tokens     (R, T)     the input
      where the header's `samples` is 0:
        ids        (R, T, K)  the teacher's K most likely next tokens, the most likely first
        log_probs  (R, T, K)  float16   and their log-probabilities
        tail       (R, T)     float16   the log of all other tokens' mass
        from_text  (R, T)     uint8     only of a teacher with another tokenizer: 1 where it had no
                                        answer, and the token that follows in the text is stored
      where it is S, draws from the teacher's distribution:
        ids        (E,)       the different tokens of each position, one position behind the other
        counts     (E,)       how many of the S draws gave each
        distinct   (R, T)     how many entries of `ids` and `counts` are a position's
        log_prob   (R, T)     float16   the mean of the draws' log-probabilities
    prefix-00000.safetensors    where prefix_blocks is not 0
        prefix     (R, T, D)  bfloat16  the state behind the first `prefix_blocks` blocks
    anchor-12-00000.safetensors
        anchor.12  (R, T, S)  bfloat16  whitened coordinates of block 12's output in its subspace

Token ids are uint16 where the vocabulary allows, else int32; counts and distinct are uint8 for up
to 255 draws, else uint16. The top 64 alone hold about nine tenths of the mass on text, so the tail
is not optional. Bytes a token at K = 64, S = 64 with two anchors and D = 576: answers 260, anchors
256, prefix 1,152; E draws that differ take 3 E + 5 instead of 260, or 4 E + 6.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from modeling.losses import SampledTargets, SparseTargets, Targets
from stages.digests import Damaged, file_digest

HEADER = "targets.json"
VERSION = 2  # of the format; 1 had no draws, and a prefix of no blocks
MOST_SAMPLES = (1 << 16) - 1  # that counts can tell
WHOLE = slice(None)


@dataclass(frozen=True)
class Header:
    """What a set of targets holds.

    teacher: registry name.  samples: draws a position, 0 where its top is kept.
    prefix_blocks: how many blocks `prefix` stands behind.  anchors: block indices.  rows: in all.
    files: name -> SHA-256.
    """

    version: int
    teacher: str
    samples: int
    prefix_blocks: int
    anchors: tuple[int, ...]
    rows: int
    row_tokens: int
    files: dict[str, str]


@dataclass(frozen=True)
class Batch:
    """Some rows of targets; shapes as in the module, flattened nowhere."""

    tokens: Tensor  # (B, T) int64
    targets: Targets  # of (B, T) positions
    prefix: Tensor | None  # (B, T, D) bfloat16; None where the prefix has no blocks
    anchors: dict[int, Tensor]  # block -> (B, T, S) float32

    def each(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """The same with a function of each tensor."""
        return Batch(
            tokens=function(self.tokens),
            targets=self.targets.each(function),
            prefix=None if self.prefix is None else function(self.prefix),
            anchors={block: function(tensor) for block, tensor in self.anchors.items()},
        )

    def next_token(self) -> tuple[Tensor, Targets]:
        """Labels and teacher targets of all positions that have a next token: B (T - 1) of them."""
        targets = self.targets[:, :-1].each(lambda tensor: tensor.flatten(0, 1))
        return self.tokens[:, 1:].flatten(), targets


def write_shard(folder: Path, number: int, tensors: dict[str, Tensor]) -> None:
    """Write what there is of one shard; each file whole or not at all."""
    files: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        kind = name.replace(".", "-") if name.startswith(("prefix", "anchor")) else "answers"
        files[kind][name] = tensor.contiguous()
    for kind, members in files.items():
        path = folder / f"{kind}-{number:05d}.safetensors"
        part = path.with_suffix(".part")
        save_file(members, part)
        part.replace(path)


def narrow(ids: Tensor, vocabulary: int) -> Tensor:
    """Token ids in the smallest type that holds all of a vocabulary."""
    return ids.to(torch.uint16 if vocabulary <= 1 << 16 else torch.int32)


def narrow_counts(counts: Tensor, samples: int) -> Tensor:
    """Counts of draws in the smallest type that holds all of them."""
    return counts.to(torch.uint8 if samples < 1 << 8 else torch.uint16)


def write_header(folder: Path, samples: int = 0, **fields) -> None:
    """Checksum all files and write targets.json; `fields` are those of Header that are left."""
    files = {path.name: file_digest(path) for path in sorted(folder.glob("*-*.safetensors"))}
    header = Header(version=VERSION, samples=samples, **fields, files=files)
    (folder / HEADER).write_text(json.dumps(asdict(header), indent=1), encoding="utf-8")


class TeacherTargets:
    """Stored targets, checked against their checksums; rows are read where they lie when asked for.

    Files are mapped, not read, so a set of targets may be larger than memory.
    """

    def __init__(self, folder: Path) -> None:
        fields = json.loads((folder / HEADER).read_text(encoding="utf-8"))
        if fields.get("version") != VERSION:
            raise ValueError(
                f"{folder / HEADER} is of version {fields.get('version', 1)} of the format, and "
                f"{VERSION} is read; extract it again: ./run_pipeline.sh --from extract"
            )
        self.header = Header(**{**fields, "anchors": tuple(fields["anchors"])})
        self._shards: dict[str, dict[str, Tensor]] = defaultdict(dict)  # number -> tensors
        for name, digest in self.header.files.items():
            if not (folder / name).is_file() or file_digest(folder / name) != digest:
                raise Damaged(
                    f"{folder / name} is damaged or missing (its checksum is not {HEADER}'s); "
                    f"extract it again: ./run_pipeline.sh --reset extract, then --from extract"
                )
            self._shards[Path(name).stem[-5:]].update(load_file(folder / name))
        sizes = [len(self._shards[number]["tokens"]) for number in sorted(self._shards)]
        self._places = [(n, row) for n, size in enumerate(sizes) for row in range(size)]
        self._ordered = [self._shards[number] for number in sorted(self._shards)]
        if self.header.samples:
            self._ends = [shard["distinct"].long().sum(-1).cumsum(0) for shard in self._ordered]

    def rows(self, picks: Tensor) -> Batch:
        """Give the rows at `picks` (B,)."""
        places = [self._places[pick] for pick in picks.tolist()]

        def stacked(name: str) -> Tensor:
            return torch.stack([self._ordered[shard][name][row] for shard, row in places])

        return Batch(
            tokens=stacked("tokens").long(),
            targets=self._draws(places, stacked) if self.header.samples else _top(stacked),
            prefix=stacked("prefix") if self.header.prefix_blocks else None,
            anchors={block: stacked(f"anchor.{block}").float() for block in self.header.anchors},
        )

    def _draws(
        self, places: list[tuple[int, int]], stacked: Callable[[str], Tensor]
    ) -> SampledTargets:
        """The draws of some rows, filled up with shares of 0 to the same number a position."""
        entries = [self._entries(shard, row) for shard, row in places]
        ids, counts = (torch.cat(column) for column in zip(*entries, strict=True))
        distinct = stacked("distinct").long()
        there = torch.arange(int(distinct.max())) < distinct[..., None]  # (B, T, K)
        padded = torch.zeros(there.shape, dtype=torch.int64)
        return SampledTargets(
            ids=padded.masked_scatter(there, ids),
            shares=padded.masked_scatter(there, counts).float() / self.header.samples,
            log_prob=stacked("log_prob").float(),
        )

    def _entries(self, shard: int, row: int) -> tuple[Tensor, Tensor]:
        """Ids and counts of one row, (E,) int64 each."""
        ends, tensors = self._ends[shard], self._ordered[shard]
        part = slice(int(ends[row - 1]) if row else 0, int(ends[row]))
        return tensors["ids"][part].long(), tensors["counts"][part].long()

    def largest_id(self) -> int:
        """The largest token id in any row or answer."""
        parts = [shard[name] for shard in self._ordered for name in ("tokens", "ids")]
        return max(int(part.long().max()) for part in parts)

    def first(self, count: int, rows: int) -> Iterator[Batch]:
        """Give the first `count` rows, in batches: those that `batches` can keep out."""
        for picks in torch.arange(min(count, self.header.rows)).split(rows):
            yield self.rows(picks)

    def batches(
        self,
        rows: int,
        steps: int,
        seed: int,
        start: int,
        reserved: int = 0,
        held_back: int = 0,
        part: slice = WHOLE,
    ) -> Iterator[Batch]:
        """Give batches `start` to `steps` of a shuffled, endless pass over all rows.

        What batch n holds follows from n and the seed alone: an interrupted pass goes on exactly.
        reserved, held_back: of the first and of the last rows, which are never given, so that they
        can be measured on.  part: of each batch, which alone is read.
        """
        there = self.header.rows - reserved - held_back
        per_epoch = there // rows
        if per_epoch <= 0:
            kept = f" less {reserved + held_back} kept out" if reserved + held_back else ""
            raise ValueError(
                f"a batch of {rows} rows is more than the {self.header.rows} rows extracted{kept}; "
                "lower distill.batch_rows or raise prepare.train_rows"
            )
        for step in range(start, steps):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + step // per_epoch)
            order = reserved + torch.randperm(there, generator=generator)
            first = step % per_epoch * rows
            yield self.rows(order[first : first + rows][part])


def _top(stacked: Callable[[str], Tensor]) -> SparseTargets:
    return SparseTargets(
        ids=stacked("ids").long(),
        log_probs=stacked("log_probs").float(),
        tail=stacked("tail").float().exp(),
    )
