"""Profile (the seeds' NIWT): which blocks of a teacher matter, and in which directions.

Steps, as calibration rows pass through the teacher block by block (measuring.py):
  1. sum up the covariance of the block's output: principal subspace, ranks at 90, 95 and 99 %
  2. compare the block's input and output: block influence
  3. go on from its input, as if it were not there: ablation harm, with a bootstrap interval
  4. control: the harm of projecting its output onto its subspace, and onto a random one

A teacher with another tokenizer than the rows' gets the same texts in its own tokens.

Influence alone is no guide to what can be dropped (some blocks turn the state little and matter
much), so `distill` goes by harm.

reads    prepare   calibration rows
writes   importance.json, subspaces.safetensors (stages/formats/importance.py), profile.png
"""

from dataclasses import dataclass

from modeling.memory import ENGINES
from stages.contract import Job, Metrics, Stage
from stages.params import require_at_least, require_one_of


@dataclass(frozen=True)
class Params:
    """The section `profile` of params.yaml; comments and units stand there."""

    ablation_rows: int
    covariance_rows: int
    batch_rows: int
    subspace_rank: int
    control_blocks: int
    resamples: int
    engine: str
    seed: int

    def __post_init__(self) -> None:
        require_at_least(2, ablation_rows=self.ablation_rows)
        require_at_least(
            1, covariance_rows=self.covariance_rows, batch_rows=self.batch_rows,
            subspace_rank=self.subspace_rank, control_blocks=self.control_blocks,
        )  # fmt: skip
        require_at_least(100, resamples=self.resamples)
        require_one_of(ENGINES, engine=self.engine)
        require_at_least(0, seed=self.seed)


def run(params: Params, job: Job) -> Metrics:
    """Measure in one passage over calibration rows; see the module's steps."""
    import torch

    from modeling.loading import locate, open_tokenizer
    from modeling.teacher import open_teacher
    from stages.formats.importance import Subspaces, write_importance
    from stages.formats.other_tokens import open_tongues, reread_rows
    from stages.formats.tokens import read_all_rows, same_tokenizer
    from stages.profile.measuring import Measuring
    from stages.profile.picture import draw_profile

    prepared, location = job.input("prepare"), locate(job.item)
    tokenizer = open_tokenizer(location)
    calibration = read_all_rows(prepared, "calibration", params.seed)
    if not same_tokenizer(prepared, tokenizer):
        job.say("another tokenizer than the rows': they are read again in the teacher's tokens")
        calibration = reread_rows(calibration, open_tongues(prepared, job.item, tokenizer))
    rows = torch.from_numpy(calibration)
    teacher = open_teacher(location, params.engine, params.batch_rows * rows.shape[1], rows.numel())
    job.say(teacher.plan.sentence)
    found = Measuring(teacher, rows, params, job).run().tensors
    teacher.close()
    blocks = summarise(found, params)
    subspaces = Subspaces(found["mean"], found["basis"], found["variance"])
    write_importance(job.output, blocks, subspaces)
    draw_profile(blocks, f"{job.item}: what each block is for", job.output / "profile.png")
    job.show("profile.png")
    return {
        "blocks": len(blocks),
        "harm_least": min(block.harm for block in blocks),
        "harm_median": sorted(block.harm for block in blocks)[len(blocks) // 2],
        "rank_95_median": sorted(block.rank_95 for block in blocks)[len(blocks) // 2],
        "projection_harm": found["kept"].nanmean().item(),
        "random_projection_harm": found["random"].nanmean().item(),
    }


def summarise(found, params: Params) -> list:
    """Turn measurements by row into one record a block."""
    from stages.formats.importance import BlockImportance, bootstrap_interval
    from stages.profile.subspace import rank_holding

    blocks = []
    for block in range(found["harm"].shape[1]):
        harm, variance = found["harm"][:, block], found["variance"][block]
        low, high = bootstrap_interval(harm, params.resamples, params.seed)
        ranks = {f"rank_{s}": rank_holding(variance, s / 100) for s in (90, 95, 99)}
        influence = found["influence"][:, block].mean().item()
        blocks.append(BlockImportance(block, harm.mean().item(), low, high, influence, **ranks))
    return blocks


STAGE = Stage("profile", Params, run)
