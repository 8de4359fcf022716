"""Take all rows through a teacher and write what is kept, so that a kill costs little.

Rows lie in shards; shards go through the teacher in groups: one by one when the weights are in
memory, as many together as there is memory for when they are streamed, because each group reads all
weights once. A step is one shard through one block. What a shard leaves at a block is written at
once; a checkpoint holds the states of the group that is under way.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from modeling.losses import SparseTargets
from modeling.refusals import count_visits
from modeling.streaming import Passage
from modeling.teacher import Teacher
from stages.contract import Job
from stages.extract.harvest import Wanted, as_tensors, harvest
from stages.formats.targets import write_shard


class Progress:
    """How many groups are done, and where the batches of the present one are."""

    COUNTS = ("together", "groups", "step", "begun", "visits")

    def __init__(self, together: int) -> None:
        self.together = together  # shards of a group; stays what it was when it began
        self.groups = 0
        self.step = 0
        self.begun = 0  # the step at which the present group began
        self.visits = 0  # blocks that a batch comes to; 0 while that is not known
        self.passage: Passage | None = None  # what is under way
        self.snapshot: dict[str, Tensor] = {}  # where an interrupted one was

    def save(self, folder: Path) -> None:
        """Write progress.json and passage.safetensors."""
        snapshot = self.passage.snapshot() if self.passage else {}
        save_file(
            {name: t.contiguous() for name, t in snapshot.items()}, folder / "passage.safetensors"
        )
        counts = {name: getattr(self, name) for name in self.COUNTS}
        (folder / "progress.json").write_text(json.dumps(counts), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""
        self.snapshot = load_file(folder / "passage.safetensors")
        counts = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
        for name in self.COUNTS:
            setattr(self, name, counts[name])


class Extraction:
    """All rows of one teacher, in shards."""

    def __init__(
        self, teacher: Teacher, rows: Tensor, wanted: Wanted, batch_rows: int, shard_rows: int,
        job: Job,
    ) -> None:  # fmt: skip
        self.teacher = teacher
        self.shards = rows.split(shard_rows)
        self.wanted = wanted
        self.batch_rows = batch_rows
        self.job = job
        self.groups: list[range] = []

    def run(self) -> None:
        """Extract what is not extracted yet."""
        per_shard = self.shards[0].numel()
        together = max(1, -(-self.teacher.plan.tokens_at_once // per_shard))
        progress = self.job.resume(Progress(together))
        numbers = range(len(self.shards))
        together = progress.together
        self.groups = [numbers[n : n + together] for n in numbers[::together]]
        for group in self.groups[progress.groups :]:
            self._take(group, progress)

    def _take(self, numbers: range, progress: Progress) -> None:
        """Take one group of shards through the teacher."""
        batches = [b for number in numbers for b in self.shards[number].split(self.batch_rows)]
        home = [n for n in numbers for _ in self.shards[n].split(self.batch_rows)]
        progress.passage = self.teacher.passage(batches)
        if progress.snapshot:
            progress.passage.restore(progress.snapshot)
            progress.snapshot = {}
        else:
            progress.step = progress.begun
            self.job.progress.cut_back("main", progress.step)
        last = {number: batch for batch, number in enumerate(home)}
        kept = {self.wanted.prefix - 1, *self.wanted.anchors} - {-1}
        gathered: list[dict[str, Tensor]] = []
        first = numbers.start * self.shards[0].numel()
        for sheaf in harvest(progress.passage, batches, self.wanted, first):
            gathered.append(sheaf.tensors)
            number = home[sheaf.batch]
            if sheaf.batch != last[number]:
                continue
            write_shard(self.job.output, number, join(gathered))
            gathered = []
            if 0 <= sheaf.block < len(self.teacher.blocks):
                progress.visits = progress.visits or count_visits(progress.passage, kept)
                self._step(progress)
        progress.passage = None
        progress.groups += 1
        progress.begun = progress.step + 1
        self._step(progress)

    def _step(self, progress: Progress) -> None:
        progress.step += 1
        steps = len(self.shards) * progress.visits + len(self.groups)
        self.job.step_done(progress, progress.step, steps)


class ShardsDone:
    """How many shards are done, where nothing else has to be kept."""

    def __init__(self) -> None:
        self.count = 0

    def save(self, folder: Path) -> None:
        """Write shards.json."""
        (folder / "shards.json").write_text(json.dumps(self.count), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""
        self.count = json.loads((folder / "shards.json").read_text(encoding="utf-8"))


def extract_answers(
    ask: Callable[[Tensor], SparseTargets], shards: Sequence[Tensor], vocabulary: int, job: Job
) -> None:
    """The same with an engine that gives answers alone; a step is a shard of rows (R, T)."""
    done = job.resume(ShardsDone())
    for number in range(done.count, len(shards)):
        tokens = shards[number]
        write_shard(job.output, number, as_tensors(ask(tokens), tokens, vocabulary))
        done.count = number + 1
        job.step_done(done, done.count, len(shards))


def join(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Put the tensors of several batches behind each other."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
