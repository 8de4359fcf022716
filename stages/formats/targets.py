"""Teacher targets: what `extract` keeps of a teacher's answers, in checksummed shards.

    targets.json                what the shards hold (see Header) and the checksum of each file
    answers-00000.safetensors   R rows of T tokens:
        tokens     (R, T)     the input
        ids        (R, T, K)  the teacher's K most likely next tokens, the most likely first
        log_probs  (R, T, K)  float16   and their log-probabilities
        tail       (R, T)     float16   the log of all other tokens' mass
    prefix-00000.safetensors
        prefix     (R, T, D)  bfloat16  the state behind the first `prefix_blocks` blocks
    anchor-12-00000.safetensors
        anchor.12  (R, T, S)  bfloat16  whitened coordinates of block 12's output in its subspace

Token ids are uint16 where the vocabulary allows, else int32. The top 64 alone hold about nine
tenths of the mass on text, so the tail is not optional. Bytes a token at K = 64, S = 64 with two
anchors and D = 576: answers 260, anchors 256, prefix 1,152.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from modeling.losses import SparseTargets
from stages.digests import Damaged, file_digest

HEADER = "targets.json"


@dataclass(frozen=True)
class Header:
    """What a set of targets holds.

    teacher: registry name.  prefix_blocks: how many blocks `prefix` stands behind.
    anchors: block indices.  rows: in all.  files: name -> SHA-256.
    """

    teacher: str
    prefix_blocks: int
    anchors: tuple[int, ...]
    rows: int
    row_tokens: int
    files: dict[str, str]


@dataclass(frozen=True)
class Batch:
    """Some rows of targets; shapes as in the module, flattened nowhere."""

    tokens: Tensor  # (B, T) int64
    ids: Tensor  # (B, T, K) int64
    log_probs: Tensor  # (B, T, K) float32
    tail: Tensor  # (B, T) float32, a mass
    prefix: Tensor  # (B, T, D) bfloat16
    anchors: dict[int, Tensor]  # block -> (B, T, S) float32

    def next_token(self) -> tuple[Tensor, SparseTargets]:
        """Labels and teacher targets of all positions that have a next token: B (T - 1) of them."""
        labels = self.tokens[:, 1:].flatten()
        parts = (self.ids[:, :-1], self.log_probs[:, :-1])
        ids, log_probs = (part.flatten(0, 1) for part in parts)
        return labels, SparseTargets(ids, log_probs, self.tail[:, :-1].flatten())


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


def write_header(folder: Path, **fields) -> None:
    """Checksum all files and write targets.json; `fields` are those of Header but `files`."""
    files = {path.name: file_digest(path) for path in sorted(folder.glob("*-*.safetensors"))}
    header = Header(**fields, files=files)
    (folder / HEADER).write_text(json.dumps(asdict(header), indent=1), encoding="utf-8")


class TeacherTargets:
    """Stored targets, checked against their checksums; rows are read where they lie when asked for.

    Files are mapped, not read, so a set of targets may be larger than memory.
    """

    def __init__(self, folder: Path) -> None:
        fields = json.loads((folder / HEADER).read_text(encoding="utf-8"))
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

    def rows(self, picks: Tensor) -> Batch:
        """Give the rows at `picks` (B,)."""
        places = [self._places[pick] for pick in picks.tolist()]
        names = self._ordered[0]
        part = {
            name: torch.stack([self._ordered[shard][name][row] for shard, row in places])
            for name in names
        }
        return Batch(
            tokens=part["tokens"].long(),
            ids=part["ids"].long(),
            log_probs=part["log_probs"].float(),
            tail=part["tail"].float().exp(),
            prefix=part["prefix"],
            anchors={block: part[f"anchor.{block}"].float() for block in self.header.anchors},
        )

    def batches(self, rows: int, steps: int, seed: int, start: int) -> Iterator[Batch]:
        """Give batches `start` to `steps` of a shuffled, endless pass over all rows.

        What batch n holds follows from n and the seed alone: an interrupted pass goes on exactly.
        """
        per_epoch = self.header.rows // rows
        if per_epoch == 0:
            raise ValueError(
                f"a batch of {rows} rows is more than the {self.header.rows} rows extracted; "
                "lower distill.batch_rows or raise prepare.train_rows"
            )
        for step in range(start, steps):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + step // per_epoch)
            order = torch.randperm(self.header.rows, generator=generator)
            first = step % per_epoch * rows
            yield self.rows(order[first : first + rows])
