"""What routing costs while a prompt is read, and what is read again for adapters that begin early.

    .venv/bin/python benchmarks/routing.py STUDENT ROUTER [--rounds 15]

STUDENT: a model's folder (artifacts/distill/student).  ROUTER: artifacts/route.  Random rank-16
adapters stand for the capabilities; prompts of 32, 128 and 512 tokens, one at a time, one thread.

    oracle   the adapter is known before the prompt is read
    late     routed; adapters change the blocks behind those that the router reads alone
    early    routed; adapters change all blocks, so the first ones are read twice

Methods take turns. Printed: milliseconds of processor time in the median, the median ratio to the
oracle's with the same adapters, and the router's own share (pooling, choosing, taking adapters from
the bank) of the late reading (bar: 1 %).

Measured (laptop student, a router that reads blocks 4, 8 and 12 of 24; AVX2, float32): late takes
1.003, 1.013 and 0.996 times the oracle's reading of 32, 128 and 512 tokens, the router's own share
is 0.96, 0.38 and 0.09 %; early takes 1.44, 1.46 and 1.47 times.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from modeling.blocks import dissect
from modeling.loading import open_model, open_tokenizer
from modeling.lora import AdapterShape, adapt, save_adapter
from modeling.router import open_router
from runtime.adapters.bank import AdapterBank
from runtime.adapters.routing import Routing
from runtime.generation.packed_model import PackedModel
from runtime.generation.packed_session import PackedSession

RANK, LENGTHS, BAR = 16, (32, 128, 512), 0.01


class Timed(Routing):
    """Counts the seconds that it takes itself."""

    seconds = 0.0

    def pool(self, prompts, hidden):
        """As ever, timed."""
        began = time.process_time()
        found = super().pool(prompts, hidden)
        self.seconds += time.process_time() - began
        return found

    def choose(self, states):
        """As ever, timed."""
        began = time.process_time()
        found = super().choose(states)
        self.seconds += time.process_time() - began
        return found


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("student", type=Path)
    parser.add_argument("router", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = open_model(options.student), open_tokenizer(options.student)
    router = open_router(options.router, model.config.get_text_config().hidden_size)
    router.threshold.fill_(-1.0)  # random tokens are out of scope, and an adapter is to be used
    with torch.no_grad():
        router.outer.bias[-1] = -1e4
    behind = len(dissect(model).blocks) - router.shape.blocks[-1]
    banks = {
        name: bank_of(options.student, model, router.shape.capabilities, last)
        for name, last in (("late", behind), ("early", 0))
    }
    packed = PackedModel(model, half_weights=True)
    print(f"blocks {router.shape.blocks} of {len(packed.blocks)}; {packed.description}\n")
    print(f"{'tokens':>6} {'way':<14}{'ms':>10}{'/ oracle':>10}{'router':>10}")
    for length in LENGTHS:
        prompt = [(7 * t) % 1000 + 100 for t in range(length)]
        for name, bank in banks.items():
            compare(packed, prompt, name, Timed(router, bank, tokenizer), bank, options.rounds)


def bank_of(folder: Path, model, names: tuple[str, ...], last_blocks: int) -> AdapterBank:
    """A bank with a random adapter for each capability."""
    bank = AdapterBank(model, 1 << 40)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        shape = AdapterShape(RANK, float(RANK), "lora", (), last_blocks)
        adapted = adapt(open_model(folder), shape, 0, place / "start")
        for name in names:
            save_adapter(adapted, place / name)
            bank.add(name, place / name)
    return bank


@torch.no_grad()
def compare(
    packed: PackedModel,
    prompt: list[int],
    name: str,
    routing: Timed,
    bank: AdapterBank,
    rounds: int,
) -> None:
    """Let the oracle and the router take turns at one prompt, and print both."""
    mix = ((next(iter(bank.take([bank.listing()[0].name]).values())), 1.0),)
    oracle, routed, own = [], [], []
    for number in range(rounds + 1):  # the first one does not count
        began = time.process_time()
        PackedSession(packed, [prompt], 1, [mix])
        between = time.process_time()
        routing.seconds = 0.0
        PackedSession(packed, [prompt], 1, None, routing)
        if number:
            oracle.append(between - began)
            routed.append(time.process_time() - between)
            own.append(routing.seconds)
    ratio = median(r / o for r, o in zip(routed, oracle, strict=True))
    share = median(s / r for s, r in zip(own, routed, strict=True))
    bar = f"   bar {BAR:.0%}" if name == "late" else ""
    print(f"{len(prompt):>6} {'oracle':<14}{1e3 * median(oracle):>10.1f}")
    print(
        f"{'':>6} {name:<14}{1e3 * median(routed):>10.1f}{ratio:>10.3f}{share:>10.2%}{bar}",
        flush=True,
    )


if __name__ == "__main__":
    main()
