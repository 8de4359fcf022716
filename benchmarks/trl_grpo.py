"""A step of GRPO beside TRL's GRPOTrainer: the same prompts, sampling and adapter.

    python -m venv TRL && TRL/bin/pip install trl==1.16.0 ...   # and .venv's torch, peft, ...
    .venv/bin/python -m benchmarks.trl_grpo --trl-python TRL/bin/python [--rounds 3] [--prompts 4]

    ours   runtime/generation's engine on the merged adapter, packed anew each step, and one update
           as stages/grpo makes it: prompts computed once a group, kernels for adapted layers
    TRL    GRPOTrainer: transformers' generate, one update; all answers in one batch, fused AdamW,
           no gradient checkpointing, no KL term (as ours)

Both answer each prompt (an arithmetic problem) four times with at most 48 tokens at temperature 1
and learn from it once; LoRA of rank 16 on all linear layers of SmolLM2-135M in float32, dr_grpo.
Without tools, which TRL cannot run in the middle of SmolLM2's answers. A reward that hardly ever
ties lets every answer teach. The draws are not the same, so times are by token that was written.
benchmarks/turns.py says how the sides are measured; seconds are the processor's.

Measured (AVX2, one thread, float32, another benchmark beside it at first, 3 steps): by
token, TRL takes 2.0, 2.4 and 2.1 times as long; medians: generation 14.7 s against 7.0 s, update
24.1 s against 9.8 s, for about 750 tokens; 8,337 MB against 2,943 MB.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks.turns import prepare, report, take_turns

SIDES = Path(__file__).with_name("trl_grpo_sides.py")


def main() -> None:
    """Start the sides, let them take turns, and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--trl-python", required=True, help="a Python that has trl and this project's packages")
    add("--rounds", type=int, default=3, help="steps of each that count (3)")
    add("--warm-up", type=int, default=1, help="steps before, which do not (1)")
    add("--prompts", type=int, default=4, help="problems a step, each answered four times (4)")
    options = parser.parse_args()
    pythons = {"ours": sys.executable, "TRL": options.trl_python}
    with tempfile.TemporaryDirectory(prefix="trl-grpo-") as folder:
        Path(folder, "prompts").write_text(str(options.prompts), encoding="utf-8")
        prepare(SIDES, folder)
        steps, memory = take_turns(SIDES, pythons, folder, options.warm_up, options.rounds)
    report(steps, memory, rival="TRL", by="ms a token")
    for part in ("generation s", "update s"):
        print(f"\n{part}, of TRL by ours:")
        report(steps, memory, rival="TRL", by=part)


if __name__ == "__main__":
    main()
