"""How much of its teacher a student keeps, by its size and by what its training costs.

    .venv/bin/python benchmarks/size_curve.py ARTIFACTS OUT [--blocks 27 24 20] [--steps 80 320]

ARTIFACTS: a folder with the outputs of prepare, profile and extract (./run_pipeline.sh --preset
overnight --stage extract makes artifacts/). For every number of steps, and every number of the
teacher's blocks that stay: the blocks of least harm go, gaps are closed in closed form, and the
student learns from the stored answers as `distill` does with the params.yaml in force; its learning
rate falls over the steps it has. Seconds are the processor's, of one thread, all but the teacher's
own (profile, extract), which every student shares.

Printed, and written to OUT/curve.json after every student, so that a run that is stopped goes on
where it was: perplexity over the teacher's, top-1 agreement and KL over the whole vocabulary on
held-out rows, with 95 % bootstrap intervals over rows. OUT/curve.png is the picture of it.

Measured (AVX2, float32, the laptop preset's rows, 24 of them held out; a machine with other work):

    blocks  steps  core-seconds  perplexity              agreement             KL
    27      80     582           x 1.005 [0.974, 1.035]  0.786 [0.773, 0.798]  0.201 [0.183, 0.222]
    24      80     476           x 1.142 [1.098, 1.191]  0.725 [0.707, 0.743]  0.358 [0.327, 0.397]
    20      80     402           x 1.614 [1.499, 1.761]  0.600 [0.580, 0.621]  0.678 [0.617, 0.755]
"""

import argparse
import json
import time
from pathlib import Path

import torch
from plain_kd import Setting, close, measure, open_setting
from torch import Tensor

from modeling.fast_path import fast_path
from stages.distill.student import build_student
from stages.formats.importance import bootstrap_interval
from stages.formats.tokens import read_rows

PATCH_ROWS = 96  # calibration rows for closing the gaps
TEXT = "python-docs"


def main() -> None:
    """Train what is not there yet, shortest first; then the table and the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifacts", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--blocks", type=int, nargs="+", default=[27, 24, 20])
    parser.add_argument("--steps", type=int, nargs="+", default=[80, 320])
    parser.add_argument("--measured-rows", type=int, default=48, help="held-out rows (48)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "curve.json"
    points = json.loads(file.read_text()) if file.exists() else []
    setting = open_setting(options.artifacts)
    rows = read_rows(options.artifacts / "prepare", "heldout")[TEXT][: options.measured_rows]
    for steps in sorted(options.steps):
        for blocks in options.blocks:
            if not any((p["blocks"], p["steps"]) == (blocks, steps) for p in points):
                points.append(point(setting, blocks, steps, torch.from_numpy(rows)))
                file.write_text(json.dumps(points, indent=1), encoding="utf-8")
                print(line(points[-1]), flush=True)
    print("\n| blocks | steps | core-seconds | perplexity | agreement | KL |\n" + "|---" * 6 + "|")
    print("\n".join(map(line, points)))
    draw(points, options.out / "curve.png")


def point(setting: Setting, blocks: int, steps: int, rows: Tensor) -> dict:
    """Train one student and measure it."""
    harms, prefix = setting.harms, setting.targets.header.prefix_blocks
    order = sorted(range(prefix + 1, len(harms)), key=harms.__getitem__)
    dropped = sorted(order[: len(harms) - blocks])
    own = Setting(
        setting.artifacts, setting.teacher, setting.targets, dropped, harms, setting.params
    )
    began = time.process_time()
    student, _ = close(own, build_student(setting.teacher, dropped), PATCH_ROWS)
    with fast_path(student, print):
        own.train(student, True, steps, steps, setting.params.seed)
    seconds = time.process_time() - began
    found = measure(setting.teacher, {"student": student.requires_grad_(False)}, rows)["student"]
    return {
        "blocks": blocks,
        "steps": steps,
        "seconds": round(seconds),
        "perplexity": [value.exp().item() for value in interval(found["ce"])],
        "agreement": [value.item() for value in interval(found["agree"])],
        "kl": [value.item() for value in interval(found["kl"])],
    }


def interval(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mean over rows, and its bootstrap interval's ends."""
    low, high = bootstrap_interval(values, 1000, 0)
    return values.mean(), torch.as_tensor(low), torch.as_tensor(high)


def line(point: dict) -> str:
    """One row of the table."""
    ppl, agree, kl = (
        "{:.3f} [{:.3f}, {:.3f}]".format(*point[name]) for name in ("perplexity", "agreement", "kl")
    )
    return (
        f"| {point['blocks']} | {point['steps']} | {point['seconds']} | x {ppl} | {agree} | {kl} |"
    )


def draw(points: list[dict], path: Path) -> None:
    """Perplexity over the teacher's by core-seconds, a line a size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for blocks in sorted({p["blocks"] for p in points}):
        of = sorted((p for p in points if p["blocks"] == blocks), key=lambda p: p["seconds"])
        middle, low, high = zip(*(p["perplexity"] for p in of), strict=True)
        spread = [[m - x for m, x in zip(middle, low, strict=True)]]
        spread.append([x - m for m, x in zip(middle, high, strict=True)])
        seconds = [p["seconds"] for p in of]
        axes.errorbar(seconds, middle, spread, marker="o", capsize=3, label=f"{blocks} blocks")
    axes.axhline(1.05, color="grey", linestyle=":", label="x 1.05: keeps 95 %")
    axes.set(xscale="log", xlabel="core-seconds", ylabel="perplexity over the teacher's")
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
