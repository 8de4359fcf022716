"""Dropping blocks: by one ranking, and greedily with harms measured again after every drop.

    .venv/bin/python benchmarks/depth.py ARTIFACTS [--drop 6] [--rows 8] [--widths 0 8]

ARTIFACTS: a folder with the outputs of prepare and profile (./run_pipeline.sh --stage profile makes
artifacts/). Printed for each width of the search (0: one ranking): which blocks went, what the
search took, and the KL from the teacher in nats a token on held-out text, before and after the gaps
are closed, with the paired difference from the first width and its 95 % bootstrap interval.

Measured (SmolLM2-135M, 6 of 30, 8 held-out rows, gaps closed on 48): by the ranking blocks 12, 13,
14, 17, 25 and 26 go, KL 0.908, with gaps closed 0.422. The search with 8 candidates on 4 rows takes
138 processor seconds in float32 and drops the same.
"""

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor

from modeling.loading import locate, open_model
from modeling.losses import TeacherView
from stages.distill.search import Search, search_blocks
from stages.distill.student import build_student, close_gaps, find_gaps
from stages.formats.importance import bootstrap_interval, read_importance
from stages.formats.tokens import read_all_rows


def main() -> None:
    """Search with each width, and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifacts", type=Path)
    parser.add_argument("--teacher", default="smollm2-135m")
    parser.add_argument("--drop", type=int, default=6, help="blocks to drop (6)")
    parser.add_argument("--prefix", type=int, default=10, help="first blocks that stay (10)")
    parser.add_argument("--rows", type=int, default=8, help="calibration rows for the search (8)")
    parser.add_argument("--patch-rows", type=int, default=48, help="for closing gaps (48)")
    parser.add_argument("--measured-rows", type=int, default=16, help="held-out rows (16)")
    parser.add_argument("--widths", type=int, nargs="+", default=[0, 8], help="(0 8)")
    options = parser.parse_args()
    prepared = options.artifacts / "prepare"
    harms = [b.harm for b in read_importance(options.artifacts / "profile" / options.teacher)]
    rows = torch.from_numpy(read_all_rows(prepared, "calibration", 0))
    heldout = torch.from_numpy(read_all_rows(prepared, "heldout", 0))[: options.measured_rows]
    teacher = open_model(locate(options.teacher))
    first: tuple[Tensor, Tensor] | None = None
    for width in options.widths:
        began = time.process_time()
        search = Search(harms, options.drop, options.prefix)
        for _ in search_blocks(teacher, list(rows[: options.rows].split(2)), search, width):
            pass
        taken = time.process_time() - began
        dropped = sorted(search.dropped)
        student = build_student(teacher, dropped)
        before = divergence(teacher, student, heldout)
        patch = rows[: options.patch_rows]
        list(close_gaps(teacher, student, find_gaps(dropped), patch, 0.1, batch_rows=8))
        after = divergence(teacher, student, heldout)
        print(
            f"width {width}: {dropped}, {taken:.0f} processor seconds; KL {before.mean():.4f}, "
            f"gaps closed {after.mean():.4f}",
            flush=True,
        )
        if first is None:
            first = before, after
            continue
        for what, here, there in (("", before, first[0]), (", gaps closed", after, first[1])):
            low, high = bootstrap_interval(here - there, 1000, 0)
            print(
                f"    less width {options.widths[0]}{what}: {(here - there).mean():+.4f} "
                f"[{low:+.4f}, {high:+.4f}]",
                flush=True,
            )


@torch.no_grad()
def divergence(teacher, student, rows: Tensor) -> Tensor:
    """KL from the teacher of each row (N, T): (N,) nats a token."""
    found = []
    for row in rows.split(1):
        view = TeacherView.of(teacher(row, use_cache=False).logits[0])
        found.append(view.kl(student(row, use_cache=False).logits[0]).mean())
    return torch.stack(found)


if __name__ == "__main__":
    main()
