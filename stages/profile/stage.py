"""Profile (the seeds' NIWT): which blocks of a teacher matter, and in which directions.

Steps, on calibration rows:
  1. run the teacher and keep the state at every block boundary
  2. skip each block in turn, resuming behind it: ablation harm, with a bootstrap interval
  3. compare each block's input and output: block influence
  4. sum up covariances of block outputs: principal subspaces, and ranks at 90, 95 and 99 %
  5. control: the harm of projecting a block's output onto its subspace, and onto a random one

Influence alone is no guide to what can be dropped (some blocks turn the state little and matter
much), so `distill` goes by harm.

reads    prepare   calibration rows
writes   importance.json, subspaces.safetensors (stages/formats/importance.py), profile.png
"""

from dataclasses import dataclass
from pathlib import Path

from stages.contract import Job, Metrics, Stage
from stages.params import require_at_least


@dataclass(frozen=True)
class Params:
    """The section `profile` of params.yaml; comments and units stand there."""

    ablation_rows: int
    covariance_rows: int
    batch_rows: int
    subspace_rank: int
    control_blocks: int
    resamples: int
    seed: int

    def __post_init__(self) -> None:
        require_at_least(2, ablation_rows=self.ablation_rows)
        require_at_least(
            1, covariance_rows=self.covariance_rows, batch_rows=self.batch_rows,
            subspace_rank=self.subspace_rank, control_blocks=self.control_blocks,
        )  # fmt: skip
        require_at_least(100, resamples=self.resamples)
        require_at_least(0, seed=self.seed)


class Measured:
    """What has been measured so far; an interrupted profile goes on from it."""

    def __init__(self, blocks: int, width: int) -> None:
        import torch

        from stages.profile.subspace import RunningCovariance

        self.batches = 0
        self.harm = torch.zeros(0, blocks)  # (rows, L)
        self.influence = torch.zeros(0, blocks)
        self.kept = torch.zeros(0, blocks)  # harm of projecting onto the subspace
        self.random = torch.zeros(0, blocks)  # and onto a random one
        self.covariance = RunningCovariance(blocks, width)

    def save(self, folder: Path) -> None:
        """Write measured.safetensors."""
        import torch
        from safetensors.torch import save_file

        c = self.covariance
        tensors = {
            "counts": torch.tensor([self.batches, c.count]),
            "harm": self.harm, "influence": self.influence, "kept": self.kept,
            "random": self.random, "total": c.total, "products": c.products,
        }  # fmt: skip
        save_file(tensors, folder / "measured.safetensors")

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""
        from safetensors.torch import load_file

        tensors = load_file(folder / "measured.safetensors")
        self.batches, self.covariance.count = tensors.pop("counts").tolist()
        self.covariance.total = tensors.pop("total")
        self.covariance.products = tensors.pop("products")
        for name, tensor in tensors.items():
            setattr(self, name, tensor)


def run(params: Params, job: Job) -> Metrics:
    """Measure, in three passes over calibration rows; see the module's steps."""
    import torch

    from modeling.loading import locate, open_model
    from stages.formats.importance import Subspaces, write_importance
    from stages.formats.tokens import read_all_rows
    from stages.profile.picture import draw_profile

    rows = torch.from_numpy(read_all_rows(job.input("prepare"), "calibration", params.seed))
    model = open_model(locate(job.item))
    measured = Measured(model.config.num_hidden_layers, model.config.hidden_size)

    with torch.no_grad():
        measured = job.resume(measured, "covariance")
        sum_covariance(model, rows[: params.covariance_rows], measured, params, job)
        mean, directions, variance = measured.covariance.principal()
        subspaces = Subspaces(mean, directions[:, :, : params.subspace_rank], variance)
        measured.batches = 0
        measured = job.resume(measured, "ablation")
        ablate(model, rows[: params.ablation_rows], subspaces, measured, params, job)

    blocks = summarise(measured, variance, params)
    write_importance(job.output, blocks, subspaces)
    draw_profile(blocks, f"{job.item}: what each block is for", job.output / "profile.png")
    job.show("profile.png")
    tested = control_blocks(len(blocks), params.control_blocks)
    return {
        "blocks": len(blocks),
        "harm_least": min(block.harm for block in blocks),
        "harm_median": sorted(block.harm for block in blocks)[len(blocks) // 2],
        "rank_95_median": sorted(block.rank_95 for block in blocks)[len(blocks) // 2],
        "projection_harm": measured.kept[:, tested].mean().item(),
        "random_projection_harm": measured.random[:, tested].mean().item(),
    }


def sum_covariance(model, rows, measured: Measured, params: Params, job: Job) -> None:
    """Pass 1: accumulate the covariance of every block's output."""
    from stages.profile.ablation import Trace

    batches = rows.split(params.batch_rows)
    for batch in batches[measured.batches :]:
        measured.covariance.add(Trace(model, batch).states[1:])
        measured.batches += 1
        job.step_done(measured, measured.batches, len(batches), "covariance")


def ablate(model, rows, subspaces, measured: Measured, params: Params, job: Job) -> None:
    """Pass 2: skip each block in turn; for some, project its output instead."""
    import torch

    from stages.profile.ablation import Trace
    from stages.profile.subspace import project, random_basis

    batches = rows.split(params.batch_rows)
    count, width, rank = subspaces.basis.shape
    tested = set(control_blocks(count, params.control_blocks))
    for batch in batches[measured.batches :]:
        trace = Trace(model, batch)
        columns: dict[str, list] = {"harm": [], "influence": [], "kept": [], "random": []}
        for block in range(count):
            columns["harm"].append(trace.harm_of_skipping(block))
            columns["influence"].append(trace.influence(block))
            for name in ("kept", "random"):
                harm = torch.full((len(batch),), float("nan"))
                if block in tested:
                    basis = subspaces.basis[block]
                    if name == "random":
                        basis = random_basis(width, rank, params.seed + block)
                    output = project(trace.states[block + 1], subspaces.mean[block], basis)
                    harm = trace.harm_of(block + 1, output)
                columns[name].append(harm)
        for name, values in columns.items():
            setattr(measured, name, torch.cat([getattr(measured, name), torch.stack(values, -1)]))
        measured.batches += 1
        harm = measured.harm.mean().item()
        job.step_done(measured, measured.batches, len(batches), "ablation", mean_harm=harm)


def control_blocks(count: int, wanted: int) -> list[int]:
    """Which blocks the projection control looks at: evenly spread, the last one among them."""
    wanted = min(wanted, count)
    return sorted({round((i + 1) * count / wanted) - 1 for i in range(wanted)})


def summarise(measured: Measured, variance, params: Params) -> list:
    """Turn measurements by row into one record a block."""
    from stages.formats.importance import BlockImportance, bootstrap_interval
    from stages.profile.subspace import rank_holding

    blocks = []
    for block in range(measured.harm.shape[1]):
        low, high = bootstrap_interval(measured.harm[:, block], params.resamples, params.seed)
        ranks = {f"rank_{s}": rank_holding(variance[block], s / 100) for s in (90, 95, 99)}
        harm = measured.harm[:, block].mean().item()
        influence = measured.influence[:, block].mean().item()
        blocks.append(BlockImportance(block, harm, low, high, influence, **ranks))
    return blocks


STAGE = Stage("profile", Params, run)
