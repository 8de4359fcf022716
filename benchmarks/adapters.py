"""Several adapters in one batch beside one that is merged: decoded tokens a second, and switching.

    .venv/bin/python benchmarks/adapters.py                                  # some four minutes
    .venv/bin/python benchmarks/adapters.py --student artifacts/distill/student --rounds 2 --new 9

    merged         an adapter added to the weights before they are packed, as sft leaves it
    no adapter     an engine with a bank, its rows without one
    bank, 1        all rows with the same adapter of the bank
    bank, mixed    the rows' adapters take turns: --adapters of them in one batch

Rows of 8 tokens, a candidate each; one thread; rank-16 LoRA on all linear layers, random. Methods
take turns; printed are medians over rounds of processor seconds, decoding alone (a call of --new
tokens less one of a single token, so prompts are not counted), and of merged / this in each round.

Switching is all that stands between a request for another adapter and its first product: taking it
from the bank and finding its rows' tokens (bar: 5 ms, wall clock). Beside it: reading one that had
to make room, from its folder (the page cache holds it); PEFT's set_adapter; and what switching took
before: merging another adapter and packing the weights again.

Measured (AVX2, float32, one thread of a machine whose other core was busy; SmolLM2, 32 rows, 16
steps): merged 197 tokens / s, a bank's one adapter 180, 8 mixed 143; switching 0.04 ms, at the most
0.2; from disk 27; PEFT's set_adapter 16; merging and packing again 1,783.
"""

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from modeling.loading import locate, open_model, open_tokenizer
from modeling.lora import AdapterShape, adapt, save_adapter
from runtime.adapters.bank import AdapterBank
from runtime.adapters.rows import Choice, RowDeltas
from runtime.generation.answers import Sampling
from runtime.generation.engine import Engine

PROMPT = 8  # tokens
BAR_MS = 5.0


def main() -> None:
    """Print two tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--student", type=Path, help="a model's folder (SmolLM2-135M)")
    add("--rows", type=int, default=32, help="decoded together (32)")
    add("--adapters", type=int, default=8, help="in the mixed batch (8)")
    add("--rank", type=int, default=16, help="of the adapters (16)")
    add("--new", type=int, default=17, help="tokens a row (17)")
    add("--rounds", type=int, default=3, help="calls of each that count (3)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = options.student or Path(locate("smollm2-135m").path)
    model, tokenizer = open_model(folder), open_tokenizer(folder)
    tokenizer.eos_token = None
    model.generation_config.eos_token_id = None
    with tempfile.TemporaryDirectory() as scratch:
        folders = write_adapters(model, Path(scratch), options.adapters, options.rank)
        bank = AdapterBank(model, 1 << 40)
        for path in folders:
            bank.add(path.name, path)
        state = bank.listing()[0]
        print(f"{len(folders)} adapters of rank {state.rank}, {state.bytes / 1e6:.1f} MB each")
        served = Engine(model, tokenizer, bank=bank)
        print(served.path)
        carrying = PeftModel.from_pretrained(copy.deepcopy(model), folders[0], "0").eval()
        carrying.load_adapter(folders[1], "1")
        carrying.merge_adapter(["0"])
        merged = Engine(carrying, tokenizer)
        prompts = [
            [(7 * row + t) % 1000 + 100 for t in range(PROMPT)] for row in range(options.rows)
        ]
        compare(served, merged, prompts, [path.name for path in folders], options)
        report_switching(bank, folders, carrying, merged, options.rows)


def write_adapters(model: PreTrainedModel, place: Path, count: int, rank: int) -> list[Path]:
    """Random adapters for a model, in folders named 0, 1, ..."""
    adapted = adapt(copy.deepcopy(model), AdapterShape(rank, float(rank), "lora"), 0, place)
    ups = [p for name, p in adapted.named_parameters() if "lora_B" in name]
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        for up in ups:
            up.data.normal_(0, 1e-3, generator=generator)
        save_adapter(adapted, place / str(number))
    return [place / str(number) for number in range(count)]


def compare(
    served: Engine,
    merged: Engine,
    prompts: list[list[int]],
    names: list[str],
    options: argparse.Namespace,
) -> None:
    """Let the methods take turns, and print what a second of each decodes."""
    rows = len(prompts)
    mixed = [names[row % len(names)] for row in range(rows)]
    methods: dict[str, tuple[Engine, list[Choice] | None]] = {
        "merged": (merged, None),
        "no adapter": (served, None),
        "bank, 1": (served, [names[0]] * rows),
        "bank, mixed": (served, mixed),
    }
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(options.rounds):
        for name, (engine, adapters) in methods.items():
            whole, first = (
                processor_seconds(lambda s=s, e=engine, a=adapters: e.answer(prompts, 1, s, a))
                for s in (of_length(options.new), of_length(1))
            )
            seconds[name].append(whole - first)
    tokens = rows * (options.new - 1)
    print(
        f"\n{rows} rows, {options.new - 1} steps\n{'':<14}{'tokens / s':>12}{'merged / this':>15}"
    )
    for name, taken in seconds.items():
        ratio = median(m / t for m, t in zip(seconds["merged"], taken, strict=True))
        print(f"{name:<14}{tokens / median(taken):>12.1f}{ratio:>15.2f}", flush=True)


def of_length(tokens: int) -> Sampling:
    """Greedy answers of so many tokens."""
    return Sampling(temperature=0, top_p=1.0, max_own_tokens=tokens, max_calls=0, seed=0)


def processor_seconds(work: Callable[[], object]) -> float:
    """Of a call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def report_switching(
    bank: AdapterBank, folders: list[Path], carrying: PeftModel, merged: Engine, rows: int
) -> None:
    """Print what it takes until another adapter can be used: median milliseconds, and the most."""
    names = [path.name for path in folders]
    small = AdapterBank(bank.model, bank.loaded_bytes // len(names))  # room for one
    for name, path in zip(names[:2], folders[:2], strict=True):
        small.add(name, path)

    def switch(source: AdapterBank, name: str) -> None:
        adapter = source.take([name])[name]
        RowDeltas([((adapter, 1.0),)] * rows, [1] * rows, bank.model.device)

    def merge_again(number: int) -> None:
        carrying.merge_adapter([str(number % 2)])
        merged.refresh()
        carrying.unmerge_adapter()  # so that the next one can be merged

    carrying.unmerge_adapter()
    print(f"\n{'switching, ms':<26}{'median':>10}{'most':>10}")
    for name, work, times in (
        ("bank, in memory", lambda n: switch(bank, names[n % len(names)]), 200),
        ("bank, read from disk", lambda n: switch(small, names[n % 2]), 10),
        ("PEFT, set_adapter", lambda n: carrying.set_adapter(str(n % 2)), 10),
        ("merge and pack again", merge_again, 2),
    ):
        taken = sorted(1e3 * wall_seconds(lambda n=n, w=work: w(n)) for n in range(times))
        bar = f"   bar {BAR_MS} ms" if name == "bank, in memory" else ""
        print(f"{name:<26}{median(taken):>10.3f}{taken[-1]:>10.3f}{bar}", flush=True)


def wall_seconds(work: Callable[[], object]) -> float:
    """Of a call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
