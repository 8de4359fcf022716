"""What four bits a weight cost and give: bytes, perplexity, and speed of decoding on a CPU.

    .venv/bin/python benchmarks/four_bit.py --rows artifacts/prepare --text python-docs

Opens a model, writes it by modeling/four_bit.py with some sizes of groups, opens
that, and compares bytes (against bfloat16), the perplexity of held-out rows (against the model's
own), and tokens a second of greedy decoding by transformers' generate. Decoding takes turns;
figures are medians, CPU-seconds of one thread.
"""

import argparse
import math
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modeling.four_bit import WEIGHTS, FourBit, open_four_bit, write_four_bit
from modeling.loading import find_anywhere, open_model
from stages.formats.tokens import read_rows


@torch.no_grad()
def loss(model: PreTrainedModel, rows: Tensor) -> float:
    """Mean cross-entropy in nats."""
    found = [model(row[None], labels=row[None], use_cache=False).loss.item() for row in rows]
    return sum(found) / len(found)


def decode(model: PreTrainedModel, prompt: Tensor, count: int) -> float:
    """CPU-seconds a token."""
    start = time.process_time()
    model.generate(
        prompt[None], max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return (time.process_time() - start) / count


def main(arguments: list[str]) -> int:
    """Compare each size of group with the model itself."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m", help="name, folder or GGUF file")
    parser.add_argument("--rows", type=Path, default=Path("artifacts/prepare"))
    parser.add_argument("--text", default="python-docs")
    parser.add_argument("--count", type=int, default=16, help="held-out rows")
    parser.add_argument("--groups", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--tokens", type=int, default=24, help="decoded each time")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    model = open_model(find_anywhere(options.model))
    rows = torch.from_numpy(read_rows(options.rows, "heldout")[options.text])[: options.count]
    rows = rows.long()
    whole = sum({id(p): 2 * p.numel() for p in model.parameters()}.values())
    own = loss(model, rows)
    print(f"{options.model}: {whole / 1e6:.1f} MB in bfloat16, perplexity {math.exp(own):.3f}")
    for group in options.groups:
        with tempfile.TemporaryDirectory() as folder:
            write_four_bit(model, Path(folder), FourBit(group))
            size = (Path(folder) / WEIGHTS).stat().st_size
            packed = open_four_bit(Path(folder))
        ratio = math.exp(loss(packed, rows) - own)
        times = [
            (
                decode(model, rows[n, :16], options.tokens),
                decode(packed, rows[n, :16], options.tokens),
            )
            for n in range(options.rounds)
        ]
        plain, four = (median(column) for column in zip(*times, strict=True))
        print(
            f"groups of {group}: {size / 1e6:.1f} MB ({whole / size:.2f} times smaller), "
            f"perplexity x {ratio:.4f}, decoding {1 / four:.1f} tokens/s against {1 / plain:.1f} "
            f"({median(a / b for a, b in times):.2f} times)", flush=True,
        )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
