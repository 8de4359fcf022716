"""From an entry of registry/students.yaml to a student that can be trained.

    pruned            the teacher less its most dispensable blocks (search.py), gaps closed in
                      closed form (student.py)
    pruned, narrower  the same with blocks of smaller sizes, refitted in closed form (width.py)
    llama, mamba      a new network with the teacher's vocabulary (fresh.py)

What the student has in common with its teacher decides how it is taught: the first blocks that are
the teacher's own are neither computed nor trained, its other blocks have counterparts in place or
in depth, and of another width its embedding and its head learn too.
"""

from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modeling.width import widths_of
from registry.catalog import lookup
from registry.records import Student
from stages.contract import Job
from stages.distill.fresh import build_new, start_embedding
from stages.distill.search import Search, search_blocks
from stages.distill.student import build_student, close_gaps, find_gaps
from stages.distill.width import BlockFit, narrow

if TYPE_CHECKING:
    from stages.distill.params import Params

BATCH_ROWS = 8  # calibration rows at a time


@dataclass(frozen=True)
class Source:
    """What a student is made from."""

    teacher: PreTrainedModel
    harms: list[float]  # of the teacher's blocks
    prefix: int  # first blocks whose output is in the targets
    rows: Tensor  # (N, T) calibration rows, on the teacher's device
    params: "Params"
    job: Job


@dataclass(frozen=True)
class Construction:
    """A student before training, and what it has in common with the teacher."""

    student: PreTrainedModel
    prefix: int  # first blocks that are the teacher's own
    dropped: list[int] | None  # of the teacher's blocks; None for a new network
    lift: Tensor | None  # (D_teacher, D_student), where its embedding is not the teacher's
    facts: dict[str, Any]  # for student.json
    metrics: dict[str, float]


def construct(source: Source) -> Construction:
    """Build the student that params.yaml names.

    Its weights are rounded to what is stored of them, so that the control is where training starts.
    Raises ValueError, before anything costly, for a student that this teacher does not allow.
    """
    entry = lookup("students", source.params.student)
    if entry.construction != "pruned":
        built = grow(entry, source)
    else:
        built = shrink(entry, source) if entry.keep else shorten(entry, source)
    for parameter in built.student.parameters():
        parameter.data.copy_(parameter.data.to(torch.bfloat16))
    source.job.ranks.copy_from_lead([*built.student.parameters()])
    return built


def shorten(entry: Student, source: Source) -> Construction:
    """The teacher less some blocks behind the prefix, which stays shared."""
    params, job, teacher = source.params, source.job, source.teacher
    dropped, order = choose_blocks(entry.drop_blocks, source.prefix, source)
    student, gaps, explained = build_student(teacher, dropped), find_gaps(dropped), []
    rows = source.rows[: params.patch_rows]
    for share in close_gaps(teacher, student, gaps, rows, params.patch_ridge, BATCH_ROWS):
        explained.append(share)
        job.note("gaps", len(explained), len(gaps), explained=share)
    facts = {"dropped": dropped, **order, "gap_explained": explained}
    metrics = {"blocks_dropped": len(dropped), "gap_explained": mean(explained)}
    return Construction(student, source.prefix, dropped, None, facts, metrics)


def shrink(entry: Student, source: Source) -> Construction:
    """The teacher less some blocks, the others narrower: no block is the teacher's own."""
    params, job, teacher = source.params, source.job, source.teacher
    sizes = widths_of(teacher).kept(entry.keep)
    dropped, order = choose_blocks(entry.drop_blocks, 0, source)
    count, done = len(source.harms) - len(dropped), 0

    def tell(fit: BlockFit) -> None:
        nonlocal done
        done += 1
        job.note("widths", done, count, attention=fit.attention, mlp=fit.mlp)

    rows = source.rows[: params.patch_rows]
    student, hidden, fits = narrow(
        teacher, dropped, sizes, rows, params.patch_ridge, BATCH_ROWS, tell
    )
    explained = {
        "attention_explained": [fit.attention for fit in fits],
        "mlp_explained": [fit.mlp for fit in fits],
    }
    facts = {"dropped": dropped, **order, "sizes": vars(sizes), **explained}
    metrics = {name: mean(shares) for name, shares in explained.items()}
    metrics["blocks_dropped"] = len(dropped)
    width = teacher.config.get_text_config().hidden_size
    lift = torch.eye(width)[:, hidden] if len(hidden) < width else None
    return Construction(student, 0, dropped, lift, facts, metrics)


def grow(entry: Student, source: Source) -> Construction:
    """A new network; only its embedding starts from the teacher's."""
    student = build_new(entry, source.teacher, source.params.seed)
    lift = start_embedding(student, source.teacher)
    return Construction(student, 0, None, lift, {"dropped": []}, {})


def choose_blocks(count: int, prefix: int, source: Source) -> tuple[list[int], dict[str, list]]:
    """The blocks to drop, by place; and in what order they went, with which harms."""
    params, job = source.params, source.job
    search = job.resume(Search(source.harms, count, prefix), "search")
    batches = source.rows[: params.search_rows].split(params.batch_rows)
    for _ in search_blocks(source.teacher, batches, search, params.search_width):
        job.step_done(search, len(search.dropped), count, "search", harm=search.harms[-1])
    search = job.ranks.of_lead(search)
    return sorted(search.dropped), {"order": search.dropped, "order_harms": search.harms}
