"""A distillation step beside TRL's GKDTrainer: the same student, the same tokens, one thread.

    python -m venv TRL && TRL/bin/pip install trl==1.16.0 ...   # and .venv's torch, transformers
    .venv/bin/python benchmarks/trl_gkd.py --trl-python TRL/bin/python [--rounds 5]

    ours       stages/distill: the prefix read from stored targets, the blocks behind it trained on
               the teacher's top 64 with the tail, CE and anchors; AdamW on float32 masters
    ours, own  the same with transformers' own code in the blocks (distill.fast_path: false)
    TRL        trl.experimental.gkd with lmbda 0 and beta 0 (forward KL, no generation): the teacher
               in memory runs on every batch; all parameters train, the tied embedding among them;
               fused AdamW on the weights themselves; without gradient checkpointing

Both start from the teacher less 6 of its 30 blocks and learn from batches of 2 x 256 tokens, in the
type that the processor is fast in. A step is loss, gradients, clipping and optimizer; TRL's is
`training_step`, `clip_grad_norm_` and `optimizer.step`, without its data loading and logging. The
difference in work is the method's: TRL trains 24 blocks and the embedding where we train 14 blocks,
and it has no prefix, no anchors and no cross-entropy.

Each side is a process of its own, and steps take turns, so that what else the machine does meets
both. Printed: medians of processor seconds, wall seconds and of the ratio round by round; peak
resident memory. The targets are made first, by stages/extract's own code.

Measured (AVX2, float32, 3 rounds): ours 4.06 s and 2,270 MB, with transformers' own blocks 4.10 s,
TRL 9.53 s and 4,271 MB: 2.36 and 2.25 times as long, round by round.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

PROJECT = Path(__file__).resolve().parent.parent
SIDES = Path(__file__).with_name("trl_gkd_sides.py")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
OURS, OWN, TRL = "ours", "ours, own", "TRL"


def main() -> None:
    """Start the sides, let them take turns, and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--trl-python", required=True, help="a Python that has trl and this project's packages")
    add("--rounds", type=int, default=5, help="steps of each that count (5)")
    add("--warm-up", type=int, default=1, help="steps before, which do not (1)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="trl-gkd-") as folder:
        run = [sys.executable, str(SIDES), "prepare", folder]
        subprocess.run(run, cwd=PROJECT, env=ENVIRONMENT, check=True)
        report(*take_turns(folder, options.trl_python, options.warm_up, options.rounds))


def take_turns(
    folder: str, trl_python: str, warm_up: int, rounds: int
) -> tuple[dict[str, list[tuple[float, float]]], dict[str, float]]:
    """Each side's (processor, wall) seconds of a step, round by round, and its peak bytes."""
    pythons = {OURS: sys.executable, OWN: sys.executable, TRL: trl_python}
    sides = {name: start(python, name, folder) for name, python in pythons.items()}
    steps: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for name, side in sides.items():
        print(f"{name}: {answer_of(side, name)}", flush=True)
    for number in range(warm_up + rounds):
        for name, side in sides.items():
            processor, wall = map(float, ask(side, name, str(number)).split())
            if number >= warm_up:
                steps[name].append((processor, wall))
    memory = {name: float(ask(side, name, "memory")) for name, side in sides.items()}
    for side in sides.values():
        side.stdin.close()
        side.wait()
    return steps, memory


def start(python: str, name: str, folder: str) -> subprocess.Popen:
    """A side that answers a line for a line, after a first one when it is ready."""
    return subprocess.Popen(
        [python, str(SIDES), name, folder], cwd=PROJECT, env=ENVIRONMENT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip


def ask(side: subprocess.Popen, name: str, question: str) -> str:
    """Send a line, and give the answer."""
    side.stdin.write(question + "\n")
    side.stdin.flush()
    return answer_of(side, name)


def answer_of(side: subprocess.Popen, name: str) -> str:
    """The next answer, past whatever libraries print. Raises RuntimeError when the side ended."""
    for line in side.stdout:
        if line.startswith("> "):
            return line[2:].strip()
    raise RuntimeError(f"'{name}' ended with {side.wait()}; its error is above")


def report(steps: dict[str, list[tuple[float, float]]], memory: dict[str, float]) -> None:
    """One line a side."""
    print(f"{'':<12}{'processor s':>12}{'wall s':>9}{'TRL / this':>12}{'peak MB':>10}")
    for name, timings in steps.items():
        processor, wall = (median(column) for column in zip(*timings, strict=True))
        ratio = median(trl / this for (trl, _), (this, _) in zip(steps[TRL], timings, strict=True))
        print(f"{name:<12}{processor:>12.2f}{wall:>9.2f}{ratio:>12.2f}{memory[name] / 1e6:>10,.0f}")


if __name__ == "__main__":
    main()
