"""Distilling a half-depth student on one GPU: tokens a second, FLOPs utilisation, perplexity.

    .venv/bin/python benchmarks/gpu_distill.py ARTIFACTS [--drop 15] [--minutes 10] [--rows 32]

ARTIFACTS: a folder with the outputs of prepare, profile and extract (./run_pipeline.sh --stage
extract makes artifacts/); more training rows than the laptop preset's teach more in ten minutes.
The whole of distill but its controls is done within --minutes: blocks are dropped, gaps closed, and
what time is left is training, as many steps as a timed start says there is room for.

Printed: tokens/s; model FLOPs utilisation, the FLOPs of one step's matrix products as torch counts
them (forward and backward; nothing recomputed, attention without its causal half left out, the
prefix not computed and so not counted) over the seconds of a step and the device's dense bfloat16
peak; and the student's perplexity over the teacher's on held-out rows, with a bootstrap interval.
Bars: at most x1.20, at least 45 %. Needs a CUDA GPU; says so and ends with 0 without, unless
--device cpu asks for a look at whether all of it runs. It has not been run on a GPU yet.
"""

import argparse
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from modeling.backends import be_deterministic
from modeling.loading import locate, open_model
from stages.distill.feeding import feed
from stages.distill.objective import AnchorMaps, Objective, Weights, place_anchors, trainable
from stages.distill.params import Params
from stages.distill.search import Search, search_blocks
from stages.distill.student import build_student, close_gaps, find_gaps
from stages.distill.training import Lesson
from stages.formats.importance import bootstrap_interval, read_importance, read_subspaces
from stages.formats.targets import Batch, TeacherTargets
from stages.formats.tokens import read_all_rows
from stages.learning.training import TrainState
from stages.params import read_section

WARM_STEPS = 5
TIMED_STEPS = 20

# Dense bfloat16 with float32 sums, FLOP/s, by words of the device's name, the longer ones first.
# NVIDIA's data sheets of each part (those that state "with sparsity" halved), and for RTX the
# whitepapers of GA102 and of Ada.
PEAKS = {
    "H100 NVL": 835e12, "H100 PCIe": 756e12, "H200": 989e12, "H100": 989e12, "A100": 312e12,
    "L40S": 362e12, "L40": 181e12, "A10": 125e12, "A40": 150e12, "A30": 165e12, "L4": 121e12,
    "RTX 4090": 165e12, "RTX 4080": 97e12, "RTX 3090": 71e12,
}  # fmt: skip


@dataclass(frozen=True)
class Training:
    """A student and what trains it."""

    objective: Objective
    state: TrainState
    params: Params

    def step(self, batch: Batch) -> None:
        """Learn from one batch."""
        self.objective(batch).total.backward()
        self.state.update(self.params.warmup, self.params.clip)


def main() -> None:
    """Construct, train for what time is left, measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifacts", type=Path)
    parser.add_argument("--teacher", default="smollm2-135m")
    parser.add_argument("--drop", type=int, default=15, help="blocks to drop (15, half)")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all of it (10)")
    parser.add_argument("--rows", type=int, default=32, help="rows a step (32)")
    parser.add_argument("--measured-rows", type=int, default=48, help="held-out rows (48)")
    parser.add_argument("--recompute", action="store_true", help="gradient checkpointing")
    parser.add_argument("--optimizer", choices=("adamw", "adamw_8bit"), default="adamw")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("skipped: there is no CUDA GPU")
        return
    be_deterministic(device)
    began = time.perf_counter()
    teacher = open_model(locate(options.teacher), device)
    student, lesson = construct(options, teacher)
    print(f"constructed in {time.perf_counter() - began:.0f} s: less {lesson.dropped}", flush=True)
    seconds, flops = timed(options, student, lesson)
    left = 60 * options.minutes - (time.perf_counter() - began)
    steps = max(1, int(left / seconds))
    learn(options, student, lesson, steps)
    taken = time.perf_counter() - began
    report_speed(device, lesson, seconds, flops)
    report_quality(options, teacher, student, steps, taken)


def construct(
    options: argparse.Namespace, teacher: PreTrainedModel
) -> tuple[PreTrainedModel, Lesson]:
    """Drop blocks and close the gaps, by the parameters in force."""
    params = read_section(Path("params.yaml"), "distill", Params)
    params = replace(params, batch_rows=options.rows, optimizer=options.optimizer)
    targets = TeacherTargets(options.artifacts / "extract" / options.teacher)
    profile = options.artifacts / "profile" / options.teacher
    harms = [block.harm for block in read_importance(profile)]
    rows = torch.from_numpy(read_all_rows(options.artifacts / "prepare", "calibration", 0))
    rows = rows.to(teacher.device)
    search = Search(harms, options.drop, targets.header.prefix_blocks)
    batches = list(rows[: params.search_rows].split(2))
    for _ in search_blocks(teacher, batches, search, params.search_width):
        pass
    dropped = sorted(search.dropped)
    student = build_student(teacher, dropped)
    patch = rows[: params.patch_rows]
    for _ in close_gaps(teacher, student, find_gaps(dropped), patch, params.patch_ridge, 8):
        pass
    subspaces = read_subspaces(profile)
    return student, Lesson(targets, subspaces, targets.header.prefix_blocks, dropped, harms, params)


def training_of(
    options: argparse.Namespace, student: PreTrainedModel, lesson: Lesson, steps: int
) -> tuple[Training, Iterator[Batch]]:
    """A fresh training of so many steps, and its batches."""
    params = replace(lesson.params, steps=steps)
    lesson = replace(lesson, params=params)
    weights = Weights(params.kd_weight, params.ce_weight, params.anchor_weight, params.temperature)
    anchors = place_anchors(lesson.targets.header.anchors, lesson.dropped, lesson.harms)
    maps = AnchorMaps(anchors, student.config.hidden_size).to(student.device)
    named = trainable(student, lesson.prefix, maps)
    state = TrainState(named, params.learning_rate, steps, optimizer=params.optimizer)
    objective = Objective(
        student, lesson.prefix, anchors, maps, lesson.subspaces, weights, options.recompute
    )
    return Training(objective, state, params), feed(lesson.batches(0), student.device)


def timed(
    options: argparse.Namespace, student: PreTrainedModel, lesson: Lesson
) -> tuple[float, float]:
    """Median seconds of a step, reading its batch included, and one step's FLOPs.

    The student is put back to where it was.
    """
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    training, batches = training_of(options, student, lesson, WARM_STEPS + TIMED_STEPS + 1)
    batch = next(batches)
    plain = training.objective
    plain = Objective(
        student, lesson.prefix, plain.anchors, plain.maps, lesson.subspaces, plain.weights
    )
    with FlopCounterMode(display=False) as counter:  # the model's own: nothing computed twice
        plain(batch).total.backward()
    training.state.update(lesson.params.warmup, lesson.params.clip)
    marks = [time.perf_counter()]
    for batch in batches:
        training.step(batch)
        wait(student.device)
        marks.append(time.perf_counter())
    taken = [later - earlier for earlier, later in zip(marks, marks[1:], strict=False)]
    student.load_state_dict(before)
    return median(taken[WARM_STEPS:]), float(counter.get_total_flops())


def learn(
    options: argparse.Namespace, student: PreTrainedModel, lesson: Lesson, steps: int
) -> None:
    """Train, in place."""
    training, batches = training_of(options, student, lesson, steps)
    for batch in batches:
        training.step(batch)
    wait(student.device)
    student.requires_grad_(False)


def report_speed(device: torch.device, lesson: Lesson, seconds: float, flops: float) -> None:
    """Print tokens a second and the share of the device's peak."""
    tokens = lesson.params.batch_rows * lesson.targets.header.row_tokens
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
    rate = f"{tokens / seconds:,.0f} tokens/s, {flops / tokens / 1e6:.0f} MFLOPs a token"
    peak = next((peak for words, peak in PEAKS.items() if re.search(rf"\b{words}\b", name)), None)
    share = f"MFU {flops / seconds / peak:.1%} (bar 45 %)" if peak else "no peak is known"
    print(f"{name}: {rate}, {flops / seconds / 1e12:.2f} TFLOP/s; {share}", flush=True)
    if device.type == "cuda":
        print(f"peak of memory {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB")


@torch.no_grad()
def report_quality(
    options: argparse.Namespace,
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    steps: int,
    taken_s: float,
) -> None:
    """Print the perplexity ratio and its 95 % interval."""
    rows = torch.from_numpy(read_all_rows(options.artifacts / "prepare", "heldout", 0))
    rows = rows[: options.measured_rows].to(teacher.device)
    worse = losses(student, rows) - losses(teacher, rows)
    low, high = bootstrap_interval(worse, 1000, 0)
    ratio, low, high = torch.tensor([worse.mean().item(), low, high]).exp().tolist()
    print(
        f"{steps} steps, {taken_s / 60:.1f} min in all: perplexity x {ratio:.3f} "
        f"[{low:.3f}, {high:.3f}] of the teacher's (bar x 1.20)"
    )


def losses(model: PreTrainedModel, rows: Tensor) -> Tensor:
    """The mean cross-entropy of each row (N, T), on the CPU: (N,) nats a token."""
    found = []
    for row in rows.split(1):
        logits = model(row, use_cache=False).logits[0, :-1].float()
        found.append(cross_entropy(logits, row[0, 1:]))
    return torch.stack(found).cpu()


def wait(device: torch.device) -> None:
    """Until all that was begun on a device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
