"""Fewer blocks, narrower blocks, or both: students of about equal size before training.

    .venv/bin/python benchmarks/width.py ARTIFACTS [--rows 24] [--arms NAME ...] [--steps 0]

ARTIFACTS: a folder with the outputs of prepare and profile (./run_pipeline.sh --stage profile makes
artifacts/). Printed for each arm: parameters, KL from the teacher in nats a token and the ratio of
perplexities on held-out rows, each before training and, with --steps, after that many of plain
distillation (top 64 and tail, no anchors, everything but the embedding trained). It has not been
run to its end: no figure says yet whether depth or width is better here.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modeling.blocks import dissect
from modeling.loading import locate, open_model
from modeling.losses import SparseTargets, TeacherView
from modeling.width import widths_of
from registry.records import Keep
from stages.distill.least_squares import RULES
from stages.distill.objective import AnchorMaps, Objective, Weights, trainable
from stages.distill.search import Search, search_blocks
from stages.distill.student import build_student, close_gaps, find_gaps
from stages.distill.width import narrow
from stages.formats.importance import read_importance
from stages.formats.targets import Batch
from stages.formats.tokens import read_all_rows
from stages.learning.training import TrainState

TOP_K, RIDGE = 64, 0.1
NO_REFIT = 1e9  # a ridge that leaves nothing to change


@dataclass(frozen=True)
class Arm:
    """One way to about the same size."""

    drop: int
    keep: Keep | None = None
    rule: str = "elimination"
    ridge: float = RIDGE


THREE_QUARTERS = Keep(ffn=0.734)  # of 79.6 M: what 6 blocks have
ARMS = {
    "depth": Arm(6),
    "ffn": Arm(0, THREE_QUARTERS),
    "ffn, by effect": Arm(0, THREE_QUARTERS, "effect"),
    "ffn, by activation": Arm(0, THREE_QUARTERS, "activation"),
    "ffn, no refit": Arm(0, THREE_QUARTERS, "activation", NO_REFIT),
    "ffn and depth": Arm(3, Keep(ffn=0.853)),
    "ffn and kv heads": Arm(0, Keep(ffn=0.845, kv_heads=0.667)),
    "ffn and heads": Arm(0, Keep(ffn=0.808, heads=0.667)),
    "hidden": Arm(0, Keep(hidden=0.84375)),
}


def main() -> None:
    """Build each arm, measure, train, measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifacts", type=Path)
    parser.add_argument("--teacher", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=24, help="calibration rows for fits (24)")
    parser.add_argument("--search-rows", type=int, default=8, help="for choosing blocks (8)")
    parser.add_argument("--measured-rows", type=int, default=16, help="held-out rows (16)")
    parser.add_argument("--prefix", type=int, default=10, help="first blocks that stay (10)")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM")
    parser.add_argument("--steps", type=int, default=0, help="of training, 2 rows each (0)")
    options = parser.parse_args()
    prepared = options.artifacts / "prepare"
    harms = [b.harm for b in read_importance(options.artifacts / "profile" / options.teacher)]
    rows = torch.from_numpy(read_all_rows(prepared, "calibration", 0))
    heldout = torch.from_numpy(read_all_rows(prepared, "heldout", 0))[: options.measured_rows]
    teacher = open_model(locate(options.teacher))
    searched = list(rows[: options.search_rows].split(2))
    print(f"{'arm':<20}{'M parameters':>13}{'KL':>9}{'ppl ratio':>11}{'processor s':>13}")
    for name in options.arms:
        arm, began = ARMS[name], time.process_time()
        search = Search(harms, arm.drop, options.prefix)
        for _ in search_blocks(teacher, searched, search, width=8):
            pass
        student = build(teacher, sorted(search.dropped), arm, rows[: options.rows])
        taken = time.process_time() - began
        show(name, teacher, student, heldout, taken)
        if options.steps:
            train = torch.from_numpy(read_all_rows(prepared, "train", 0))
            began = time.process_time()
            teach(teacher, student, train, options.steps)
            show("    trained", teacher, student, heldout, time.process_time() - began)


def build(teacher, dropped: list[int], arm: Arm, rows: Tensor) -> PreTrainedModel:
    """The student of an arm, refitted."""
    if arm.keep:
        sizes = widths_of(teacher).kept(arm.keep)
        rule = RULES[arm.rule]
        return narrow(teacher, dropped, sizes, rows, arm.ridge, 8, lambda _: None, rule)[0]
    student = build_student(teacher, dropped)
    list(close_gaps(teacher, student, find_gaps(dropped), rows, arm.ridge, batch_rows=8))
    return student


@torch.no_grad()
def show(name: str, teacher, student, rows: Tensor, taken: float) -> None:
    """Measure on rows (N, T) and print a line."""
    kls, gaps = [], []
    for row in rows.split(1):
        logits = teacher(row, use_cache=False).logits[0, :-1]
        labels = row[0, 1:]
        kl, ce, _ = TeacherView.of(logits).scores(
            student(row, use_cache=False).logits[0, :-1], labels
        )
        own = torch.nn.functional.cross_entropy(logits.float(), labels)
        kls.append(kl.mean())
        gaps.append(ce.mean() - own)
    size = sum(p.numel() for p in student.parameters()) / 1e6
    kl, ratio = torch.stack(kls).mean(), torch.stack(gaps).mean().exp()
    print(f"{name:<20}{size:>13.1f}{kl:>9.4f}{ratio:>11.3f}{taken:>13.0f}", flush=True)


def teach(teacher, student, rows: Tensor, steps: int) -> None:
    """Plain distillation of some steps, two rows each, the teacher asked on the way."""
    maps = AnchorMaps([], 1)
    training = TrainState(trainable(student, 0, maps), 3e-4, steps)
    objective = Objective(student, 0, [], maps, None, Weights(1.0, 0.2, 0.0, 1.0))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    for step in range(steps):
        tokens = rows[order[torch.arange(2 * step, 2 * step + 2) % len(rows)]]
        with torch.no_grad():
            log_probs = teacher(tokens, use_cache=False).logits.float().log_softmax(-1)
        top, ids = log_probs.topk(TOP_K)
        targets = SparseTargets(ids, top, (1 - top.exp().sum(-1)).clamp_min(0))
        objective(Batch(tokens, targets, None, {})).total.backward()
        training.update(warmup=0.05, clip=1.0)
    for block in dissect(student).blocks:
        block.requires_grad_(False)


if __name__ == "__main__":
    main()
