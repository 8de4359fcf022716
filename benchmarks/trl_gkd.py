"""A distillation step beside TRL's GKDTrainer: the same student, the same tokens, one thread.

    python -m venv TRL && TRL/bin/pip install trl==1.16.0 ...   # and .venv's torch, transformers
    .venv/bin/python -m benchmarks.trl_gkd --trl-python TRL/bin/python [--rounds 5]

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

benchmarks/turns.py says how the sides are measured. The targets are made first, by stages/extract's
own code.

Measured (AVX2, float32, 3 rounds): ours 4.06 s and 2,270 MB, with transformers' own blocks 4.10 s,
TRL 9.53 s and 4,271 MB: 2.36 and 2.25 times as long, round by round; 2.74 and 2.63 on a core that
other work shared (2 rounds).
"""

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks.turns import prepare, report, take_turns

SIDES = Path(__file__).with_name("trl_gkd_sides.py")


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
    pythons = {"ours": sys.executable, "ours, own": sys.executable, "TRL": options.trl_python}
    with tempfile.TemporaryDirectory(prefix="trl-gkd-") as folder:
        prepare(SIDES, folder)
        steps, memory = take_turns(SIDES, pythons, folder, options.warm_up, options.rounds)
    report(steps, memory, rival="TRL", by="processor s")


if __name__ == "__main__":
    main()
