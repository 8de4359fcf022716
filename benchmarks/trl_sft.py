"""A fine-tuning step beside TRL's SFTTrainer: the same conversations, counted tokens and adapter.

    python -m venv TRL && TRL/bin/pip install trl==1.16.0 ...   # and .venv's torch, peft, ...
    .venv/bin/python -m benchmarks.trl_sft --trl-python TRL/bin/python [--rounds 5]

    ours       stages/learning/finetuning with sft.fast_path, as the stage runs
    ours, own  the same with sft.fast_path: false (--own)
    TRL        SFTTrainer: 16 rows padded to the longest, labels on the counted tokens alone, its
               chunked cross-entropy, fused AdamW, no gradient checkpointing. Its padding-free
               batches and packing need flash attention, which no CPU has.

Both train a LoRA adapter of rank 16 on all linear layers of SmolLM2-135M in float32, on the same
batches of 16 arithmetic problems with tools. A step is loss, gradients, clipping and optimizer;
TRL's is `training_step`, `clip_grad_norm_` and `optimizer.step`, without its data loading and
logging. benchmarks/turns.py says how the sides are measured. tests/stages/test_trl_reference.py
shows that losses and gradients are the same; the first losses are printed here.

Measured (AVX2, one thread, float32, nothing else running, 3 steps, one to warm up): ours 14.8 s,
TRL 29.2 s, medians; TRL takes 1.98 times as long (1.90 to 3.42); 3,410 MB against 14,369 MB.
The first batch has a long conversation, which TRL pads all 16 to: 3,296 tokens, of which 1,957 are
real and 1,582 are left when the common 25 are computed once. The head is computed for 852 of
them, by TRL for all. First losses: 2.520400 and 2.520400.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks.turns import prepare, report, take_turns

SIDES = Path(__file__).with_name("trl_sft_sides.py")


def main() -> None:
    """Start the sides, let them take turns, and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--trl-python", required=True, help="a Python that has trl and this project's packages")
    add("--rounds", type=int, default=5, help="steps of each that count (5)")
    add("--own", action="store_true", help="ours with transformers' own code too")
    add("--warm-up", type=int, default=1, help="steps before, which do not (1)")
    options = parser.parse_args()
    pythons = {"ours": sys.executable, "TRL": options.trl_python}
    if options.own:
        pythons["ours, own"] = sys.executable
    with tempfile.TemporaryDirectory(prefix="trl-sft-") as folder:
        prepare(SIDES, folder)
        steps, memory = take_turns(SIDES, pythons, folder, options.warm_up, options.rounds)
    report(steps, memory, rival="TRL", by="processor s")


if __name__ == "__main__":
    main()
