"""What two choices cost: Prefect's server as a child of ours, and threads that spin briefly.

    .venv/bin/python benchmarks/overheads.py [--rounds 5]

Server: a flow that does nothing, run against a server of our own (flows/pipeline.py) and against
Prefect's ephemeral one; wall seconds of each, first time (it creates a database) and later.
Threads: training steps of the offline teacher's shape under three settings of libgomp, on a quiet
machine and beside one busy process; tokens a second, and how many times ours is as fast.
All are interleaved, round by round; medians are printed. Run it on a machine that is quiet itself.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

PROJECT = Path(__file__).resolve().parent.parent

SERVERS = {
    "own": "with prefect_server(Path(sys.argv[1])): nothing()",
    "ephemeral": "nothing()",
}
NOTHING = """
import sys, time
from pathlib import Path
from flows.environment import prepare_environment
prepare_environment(Path(sys.argv[1]))
from prefect import flow
from flows.pipeline import prefect_server

@flow
def nothing():
    pass

began = time.monotonic()
{body}
print(time.monotonic() - began)
"""

THREADS = {
    "ours": {},
    "libgomp's default": {"GOMP_SPINCOUNT": ""},
    "never": {"GOMP_SPINCOUNT": "0"},
}
TRAINING = """
import os, time
from stages.process import keep_freed_memory, spin_briefly
if os.environ.get("GOMP_SPINCOUNT") == "":
    del os.environ["GOMP_SPINCOUNT"]
else:
    spin_briefly()
keep_freed_memory()
import torch
from transformers import LlamaConfig, LlamaForCausalLM

shape = dict(hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3)
model = LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=12, vocab_size=8192)).bfloat16()
tokens = torch.randint(8192, (4, 128), generator=torch.Generator().manual_seed(0))
model(tokens, labels=tokens).loss.backward()
began = time.monotonic()
for _ in range(8):
    model(tokens, labels=tokens).loss.backward()
print(8 * tokens.numel() / (time.monotonic() - began))
"""


def main() -> None:
    """Measure and print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    servers(rounds)
    threads(rounds)


def servers(rounds: int) -> None:
    """Print wall seconds of a flow that does nothing, by server."""
    seconds: dict[str, list[float]] = {name: [] for name in SERVERS}
    with tempfile.TemporaryDirectory(prefix="overheads-") as folder:
        for _ in range(rounds + 1):
            for name, body in SERVERS.items():
                home = Path(folder) / name
                home.mkdir(exist_ok=True)
                seconds[name].append(answer(NOTHING.format(body=body), {}, str(home)))
    print("Prefect server    first start    later (median)")
    for name, values in seconds.items():
        print(f"{name:<18}{values[0]:>9.1f} s{median(values[1:]):>14.1f} s")


def threads(rounds: int) -> None:
    """Print training tokens a second by setting, quiet and beside a busy process."""
    rates: dict[tuple[str, bool], list[float]] = {}
    for _ in range(rounds):
        for busy in (False, True):
            for name, settings in THREADS.items():
                rates.setdefault((name, busy), []).append(train(settings, busy))
    print("\nwaiting threads         quiet        beside a busy process   (tokens/s, medians)")
    for name in THREADS:
        quiet, busy = (median(rates[name, busy]) for busy in (False, True))
        ratios = [median(rates["ours", b]) / v for b, v in ((False, quiet), (True, busy))]
        print(f"{name:<20}{quiet:>7.0f}{busy:>22.0f}     ours: x{ratios[0]:.2f}, x{ratios[1]:.2f}")


def train(settings: dict[str, str], busy: bool) -> float:
    """Tokens a second of training, alone or beside a process that never sleeps."""
    neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        return answer(TRAINING, settings)
    finally:
        if neighbour:
            neighbour.kill()
            neighbour.wait()


def answer(code: str, settings: dict[str, str], *arguments: str) -> float:
    """Run Python code in a process of its own; gives the number that it printed last."""
    left_out = ("PREFECT_API_URL", "PREFECT_HOME", "GOMP_SPINCOUNT")
    environment = {key: value for key, value in os.environ.items() if key not in left_out}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=PROJECT, env={**environment, **settings},
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return float(done.stdout.split()[-1])


if __name__ == "__main__":
    main()
