"""One passage of calibration rows through a teacher, during which everything is measured.

When a batch comes out of a block, a branch goes on from the block's input, as if the block were not
there; when all batches are out, the block's subspace is known, and more branches go on from its
output projected. So nothing before a skipped block is computed again, and a teacher that is
streamed from disk is read once.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from modeling.answers import logits_of
from modeling.refusals import count_visits, refuse_unusual
from modeling.streaming import Arrival, Passage
from modeling.teacher import Teacher
from stages.contract import Job
from stages.profile.harm import Judge, influence
from stages.profile.subspace import RunningCovariance, project, random_basis

if TYPE_CHECKING:
    from stages.profile.stage import Params

# The block skipped; its output projected onto its subspace; and onto a random one.
KINDS = ("harm", "kept", "random")


@dataclass(frozen=True)
class Branch:
    """A forward of a batch that was changed at one block."""

    kind: str
    block: int
    batch: int


class Measured:
    """What has been measured so far; an interrupted profile goes on from it.

    influence, harm, kept, random: (rows, L), NaN where not measured.  mean, variance (L, D) and
    basis (L, D, R): of each block's output.
    """

    def __init__(self, rows: int, blocks: int, width: int, rank: int, device: torch.device) -> None:
        self.step = 0
        self.visits = 0  # blocks that a batch comes to; 0 while that is not known
        self.judged = 0  # batches whose branches were compared with the whole model
        self.branches: list[Branch] = []
        self.device = device
        self.covariance = RunningCovariance(width, device)  # of the block that is under way
        self.tensors = {
            **{name: torch.full((rows, blocks), torch.nan) for name in ("influence", *KINDS)},
            "mean": torch.zeros(blocks, width),
            "variance": torch.zeros(blocks, width),
            "basis": torch.zeros(blocks, width, rank),
        }
        self.passage: Passage | None = None
        self.snapshot: dict[str, Tensor] = {}

    def save(self, folder: Path) -> None:
        """Write measured.json, measured.safetensors and passage.safetensors."""
        branches = [asdict(branch) for branch in self.branches]
        counts = {name: getattr(self, name) for name in ("step", "visits", "judged")}
        counts |= {"count": self.covariance.count, "branches": branches}
        (folder / "measured.json").write_text(json.dumps(counts), encoding="utf-8")
        sums = {"total": self.covariance.total, "products": self.covariance.products}
        save_file({**self.tensors, **sums}, folder / "measured.safetensors")
        snapshot = {name: tensor.contiguous() for name, tensor in self.passage.snapshot().items()}
        save_file(snapshot, folder / "passage.safetensors")

    def load(self, folder: Path) -> None:
        """Read what `save` wrote; nothing, where the passage cannot be restored."""
        self.snapshot = load_file(folder / "passage.safetensors")
        if not self.snapshot:
            return
        counts = json.loads((folder / "measured.json").read_text(encoding="utf-8"))
        self.step, self.visits, self.judged = (counts[n] for n in ("step", "visits", "judged"))
        self.covariance.count = counts["count"]
        self.branches = [Branch(**branch) for branch in counts["branches"]]
        self.tensors = load_file(folder / "measured.safetensors")
        self.covariance.total = self.tensors.pop("total").to(self.device)
        self.covariance.products = self.tensors.pop("products").to(self.device)


class Measuring:
    """The work on one teacher: what is where, and what comes next."""

    def __init__(self, teacher: Teacher, rows: Tensor, params: "Params", job: Job) -> None:
        self.params = params
        self.job = job
        wanted = (params.covariance_rows, params.ablation_rows)
        self.covered, ablated = (-(-count // params.batch_rows) for count in wanted)  # batches
        used = max(self.covered, ablated) * params.batch_rows
        self.batches = rows[:used].split(params.batch_rows)
        self.ablated = self.batches[:ablated]
        self.blocks = len(teacher.blocks)
        self.tested = control_blocks(self.blocks, params.control_blocks)
        self.passage = teacher.passage(self.batches)
        self.device = teacher.device
        self.width = teacher.model.config.get_text_config().hidden_size

    @torch.no_grad()
    def run(self) -> Measured:
        """Measure what is not measured yet."""
        params = self.params
        shape = (sum(map(len, self.ablated)), self.blocks, self.width, params.subspace_rank)
        measured = self.job.resume(Measured(*shape, self.device))
        self.job.progress.cut_back("main", measured.step)
        measured.passage = self.passage
        if measured.snapshot:
            for branch in measured.branches:
                self.passage.rejoin(branch.batch)
            self.passage.restore(measured.snapshot)
        before = {n: forward.hidden for n, forward in enumerate(self.passage.forwards)}
        every = range(self.blocks)
        for arrival in self.passage.run():
            refuse_unusual(self.passage, arrival)
            block, batch = arrival.block, arrival.batch
            if block >= 0 and batch < len(self.batches):  # no branch
                measured.visits = measured.visits or count_visits(self.passage, every)
                self._measure(arrival, before[batch], measured)
                before[batch] = arrival.hidden
                if batch == len(self.batches) - 1:
                    self._finish_block(block, before, measured)
                self._step(measured)
            elif block < 0:
                before[batch] = arrival.hidden
        self._judge(measured)
        return measured

    def _measure(self, arrival: Arrival, before: Tensor, measured: Measured) -> None:
        """One batch has come out of one block."""
        block, batch = arrival.block, arrival.batch
        if batch < self.covered:
            measured.covariance.add(arrival.hidden)
        if batch < len(self.ablated):
            measured.tensors["influence"][self._rows(batch), block] = influence(
                before, arrival.hidden
            )
            self._branch("harm", block, batch, before, measured)

    def _finish_block(self, block: int, outputs: dict[int, Tensor], measured: Measured) -> None:
        """All batches are out of a block: its subspace is known."""
        mean, directions, variance = measured.covariance.principal()
        measured.covariance = RunningCovariance(self.width, self.device)
        basis = directions[:, : self.params.subspace_rank]
        for name, value in (("mean", mean), ("variance", variance), ("basis", basis)):
            measured.tensors[name][block] = value
        if block in self.tested:
            other = random_basis(self.width, basis.shape[1], self.params.seed + block)
            for batch in range(len(self.ablated)):
                for kind, onto in (("kept", basis), ("random", other)):
                    output = project(outputs[batch], mean, onto)
                    self._branch(kind, block, batch, output, measured)

    def _branch(
        self, kind: str, block: int, batch: int, output: Tensor, measured: Measured
    ) -> None:
        self.passage.branch(batch, block, output)
        measured.branches.append(Branch(kind, block, batch))

    def _judge(self, measured: Measured) -> None:
        """Compare all branches with the whole model, batch by batch."""
        logits = logits_of(self.passage)
        forwards = self.passage.forwards
        for batch in range(measured.judged, len(self.ablated)):
            judge = Judge(forwards[batch], logits)
            for place, branch in enumerate(measured.branches, start=len(self.batches)):
                if branch.batch == batch:
                    harm = judge.harm(forwards[place])
                    measured.tensors[branch.kind][self._rows(batch), branch.block] = harm
            measured.judged += 1
            self._step(measured)

    def _step(self, measured: Measured) -> None:
        measured.step += 1
        steps = measured.visits * len(self.batches) + len(self.ablated)
        self.job.step_done(measured, measured.step, steps)

    def _rows(self, batch: int) -> slice:
        first = batch * self.params.batch_rows
        return slice(first, first + len(self.ablated[batch]))


def control_blocks(count: int, wanted: int) -> list[int]:
    """Which blocks the projection control looks at: evenly spread, the last one among them."""
    wanted = min(wanted, count)
    return sorted({round((i + 1) * count / wanted) - 1 for i in range(wanted)})
