"""Which FFN neurons to keep: three rules on single blocks, with and without the refit.

    .venv/bin/python benchmarks/width_rules.py ARTIFACTS [--blocks 10 20] [--keep 0.75 0.5]

ARTIFACTS: a folder with the output of prepare. Of each block by itself, on the teacher's own
states: what its MLP gives without some neurons, less what it gave, on held-out rows; mean square,
as a share of what it gave. Cheap: nothing behind the last block is run. What it says of the whole
model's answers is for benchmarks/width.py.

SmolLM2-135M, block 10, 3/4 of the neurons, 8 calibration and 2 held-out rows of 256 tokens (one
run; the other blocks and 1/2 were not run to their end): wrong without a refit 0.050 by
elimination, 0.048 by effect, 0.050 by activation; refitted 0.0361, 0.0369, 0.0383. The refit takes
a quarter off, the rule six hundredths; elimination takes 1.8 processor seconds a block, the others
none to speak of.
"""

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor

from modeling.blocks import capture_calls, dissect, run_block
from modeling.loading import locate, open_model
from modeling.width import parts_of
from stages.distill.least_squares import RULES, Moments
from stages.distill.student import caught_in, flat, token_weights
from stages.formats.tokens import read_all_rows

RIDGE = 0.1


@torch.no_grad()
def main() -> None:
    """Take inputs of each block's down_proj once, then try every rule on them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifacts", type=Path)
    parser.add_argument("--teacher", default="smollm2-135m")
    parser.add_argument("--blocks", type=int, nargs="+", default=[10, 20])
    parser.add_argument("--keep", type=float, nargs="+", default=[0.75, 0.5])
    parser.add_argument("--rows", type=int, default=8, help="calibration rows (8)")
    parser.add_argument("--measured-rows", type=int, default=2, help="held-out rows (2)")
    options = parser.parse_args()
    teacher = open_model(locate(options.teacher))
    rows = [
        torch.from_numpy(read_all_rows(options.artifacts / "prepare", split, 0))[:count]
        for split, count in (("calibration", options.rows), ("heldout", options.measured_rows))
    ]
    seen, heldout = (activations(teacher, part, options.blocks) for part in rows)
    print(f"{'block':>5} {'kept':>5} {'rule':<12}{'no refit':>10}{'refitted':>10}{'seconds':>9}")
    for block in options.blocks:
        layer = parts_of(dissect(teacher).blocks[block]).down_proj
        a, state = seen[block]
        nothing = torch.zeros(len(a), layer.out_features)  # whole, it gives what is wanted
        moments = Moments.none(layer).plus(a, nothing, token_weights(state))
        for share in options.keep:
            for name, rule in RULES.items():
                began = time.process_time()
                each = torch.arange(layer.in_features)[:, None]
                count = round(share * len(each))
                kept = rule(moments, layer.weight, RIDGE, each, count)
                taken = time.process_time() - began
                update, _ = moments.without(layer.weight, kept).solve(RIDGE)
                bare = layer.weight[:, kept]
                errors = (
                    left(layer.weight, w, kept, *heldout[block]) for w in (bare, bare + update)
                )
                cells = "".join(f"{error:>10.4f}" for error in errors)
                print(f"{block:>5} {share:>5} {name:<12}{cells}{taken:>9.1f}", flush=True)


def activations(teacher, tokens: Tensor, blocks: list[int]) -> dict[int, tuple[Tensor, Tensor]]:
    """The input of each block's down_proj (N, F) and the state behind the block (N, D)."""
    modules, calls = dissect(teacher).blocks, capture_calls(teacher, tokens)
    hidden, found = calls.hidden, {}
    for index in range(max(blocks) + 1):
        if index in blocks:
            layer = parts_of(modules[index]).down_proj
            ((a, _),), output = caught_in(modules[index], calls, index, hidden, [layer])
            hidden, found[index] = output, (flat(a), flat(output))
        else:
            hidden = run_block(modules[index], calls, index, hidden)
    return found


def left(whole: Tensor, weight: Tensor, kept: Tensor, a: Tensor, state: Tensor) -> float:
    """The share of a layer's output that is wrong when it has only some inputs."""
    w, wanted = token_weights(state), a @ whole.T
    wrong = wanted - a[:, kept] @ weight.T
    return ((wrong.square() * w).sum() / (wanted.square() * w).sum()).item()


if __name__ == "__main__":
    main()
