"""Layer streaming beside what else runs a model that is larger than the memory.

    .venv/bin/python benchmarks/streaming.py --sizes tiny --tokens 32 --rounds 1   # a minute
    .venv/bin/python benchmarks/streaming.py --folder /data/models --evict --airllm PYTHON

Task: the top-64 log-probabilities and the mass of all others at every position, and the hidden
states behind three blocks, of random tokens in a random Llama in bfloat16, written to files.
Engines, each in a process of its own, interleaved round by round; medians are printed:

    ours        modeling/streaming.py: every batch through block 0, then every batch through block 1
    accelerate  from_pretrained with all blocks on "disk", read in place for every batch
    airllm      AirLLM, from the copy that it makes beside the checkpoint (made once, not timed)
    ram         from_pretrained, timed once all weights are in memory: the floor for compute

Before a run the checkpoint's pages are dropped from the page cache, so reads go to the disk; wall
seconds count opening, but no imports. --evict drops them before each further batch, too: that is
what engines that go batch by batch see of a checkpoint larger than the page cache; without it they
find one that fits there from their second batch on. Anonymous memory is RssAnon + RssShmem,
sampled every 20 ms; the baseline is what imports left. Use a folder on a disk (no tmpfs) and a
machine that is quiet itself: 1b takes 2.2 GB there (twice that with AirLLM), 3b 6.9 GB.

AirLLM 4.0.0 runs on the CPU with the versions we have (torch 2.13, transformers 5.23) and needs
only sentencepiece besides. Keep it apart, in an environment that borrows ours:

    .venv/bin/python -m venv --system-site-packages /tmp/airllm_env
    echo $PWD/.venv/lib/python3.11/site-packages > \\
        /tmp/airllm_env/lib/python3.11/site-packages/borrowed.pth
    /tmp/airllm_env/bin/pip install --no-deps airllm==4.0.0 sentencepiece==0.2.3
    ... --airllm /tmp/airllm_env/bin/python
"""

import argparse
import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from random_models import SHAPES, checkpoint, drop_pages, size_of, weight_files

PROJECT = Path(__file__).resolve().parent.parent
ENGINES = ("ours", "accelerate", "airllm", "ram")
PIECE_BYTES = 8 << 20
GIB = 1 << 30
CGROUPS = (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max"))


def main() -> None:
    """Measure every size with every length, and print a table of each."""
    sys.stdout.reconfigure(line_buffering=True)  # in order with the rounds, on stderr
    options = parse()
    sound = True
    with tempfile.TemporaryDirectory(prefix="streaming-") as scratch:
        for size in options.sizes:
            model = checkpoint(options.folder or Path(scratch), size)
            for tokens in options.tokens:
                sound &= measure(options, size, model, tokens, Path(scratch))
    sys.exit(not sound)


def parse() -> argparse.Namespace:
    """The options."""

    def names(text: str) -> list[str]:
        return text.split(",")

    def numbers(text: str) -> list[int]:
        return [int(word) for word in text.split(",")]

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--sizes", type=names, default=["1b", "3b"], help=f"of {','.join(SHAPES)} (1b,3b)")
    add("--sequences", type=int, default=32, help="rows in all (32)")
    add("--tokens", type=numbers, default=[32, 512], help="lengths of a row (32,512)")
    add("--batch-rows", type=int, default=4, help="rows that go together (4)")
    add("--rounds", type=int, default=3, help="times each engine runs (3)")
    add("--engines", type=names, default=list(ENGINES), help=f"of {','.join(ENGINES)} (all)")
    add("--folder", type=Path, help="where checkpoints are kept and reused (a temporary one)")
    add("--airllm", metavar="PYTHON", help="an interpreter that has AirLLM; see above")
    add("--evict", action="store_true", help="drop pages before every batch, not only at first")
    add("--memory-limit-gib", type=float, help="run engines in a memory cgroup, or RLIMIT_DATA")
    add("--limited", type=names, default=["ours"], help="the engines that limit is for (ours)")
    options = parser.parse_args()
    for given, known in ((options.sizes, SHAPES), (options.engines, ENGINES)):
        if strange := set(given) - set(known):
            parser.error(f"{', '.join(strange)} is none of {', '.join(known)}")
    if "airllm" in options.engines and not options.airllm:
        print("airllm is skipped: --airllm PYTHON names an interpreter that has it (--help)")
        options.engines.remove("airllm")
    return options


def measure(
    options: argparse.Namespace, size: str, model: Path, tokens: int, scratch: Path
) -> bool:
    """All rounds of one size and length; prints a table, gives whether all answers agree."""
    split = model.with_name(f"{size}-airllm")
    job = {
        "size": size, "model": str(model), "split": str(split), "tokens": tokens,
        "sequences": options.sequences, "rows": options.batch_rows, "evict": options.evict,
    }  # fmt: skip
    if "airllm" in options.engines and not (split / "complete").is_file():
        began = time.monotonic()
        run({**job, "engine": "split"}, options, scratch)
        print(f"AirLLM's own copy of {size} was made in {time.monotonic() - began:.0f} s")
    found: dict[str, list[dict]] = {name: [] for name in options.engines}
    floors: dict[bool, list[float]] = {True: [], False: []}
    for number in range(options.rounds):
        for direct, seconds in floors.items():
            seconds.append(read_floor(model, direct))
        for name in options.engines:
            found[name].append(run({**job, "engine": name}, options, scratch))
            wall = found[name][-1]["wall"]
            print(f"  round {number + 1}: {name:<10} {wall:7.1f} s", file=sys.stderr, flush=True)
    report(options, job, found, {key: median(values) for key, values in floors.items()})
    return all([agree(scratch, options.engines[0], name) for name in options.engines[1:]])


def run(job: dict, options: argparse.Namespace, scratch: Path) -> dict:
    """One engine's run in a process of its own, from cold files; gives what it measured."""
    out = scratch / job["engine"]
    out.mkdir(exist_ok=True)
    drop_pages(Path(job["model"]), Path(job["split"]))
    limit = options.memory_limit_gib if job["engine"] in options.limited else None
    cgroup = memory_cgroup(int(limit * GIB)) if limit else None
    job = {**job, "out": str(out), "cgroup": cgroup and str(cgroup), "limit": limit}
    python = options.airllm if job["engine"] in ("airllm", "split") else sys.executable
    environment = {
        **os.environ, "PYTHONPATH": str(PROJECT), "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error",
    }  # fmt: skip
    try:
        with (out / "log").open("w+") as log:
            command = [python, str(PROJECT / "benchmarks" / "engines.py"), json.dumps(job)]
            code = subprocess.run(command, stdout=log, stderr=log, env=environment).returncode
            if code:
                log.seek(0)
                raise SystemExit(f"{job['engine']} ended with {code}:\n{log.read()[-3000:]}")
    finally:
        if cgroup:
            cgroup.rmdir()
    return json.loads((out / "measured.json").read_text()) if job["engine"] != "split" else {}


def memory_cgroup(limit: int) -> Path | None:
    """A cgroup with that much memory, page cache counted; None where none can be made."""
    for root, file in CGROUPS:
        folder = Path(root) / f"streaming-{os.getpid()}"
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            (folder / file).write_text(str(limit))
            return folder
        except OSError:
            folder.rmdir()
    return None


def read_floor(model: Path, direct: bool) -> float:
    """Seconds that one thread takes to read all weights, past the page cache or through it."""
    drop_pages(model)
    buffer = mmap.mmap(-1, PIECE_BYTES)
    began = time.monotonic()
    for file in weight_files(model):
        descriptor = os.open(file, os.O_RDONLY | (os.O_DIRECT if direct else 0))
        for at in range(0, file.stat().st_size, PIECE_BYTES):
            os.preadv(descriptor, [buffer], at)
        os.close(descriptor)
    return time.monotonic() - began


def report(options: argparse.Namespace, job: dict, found: dict, floors: dict[bool, float]) -> None:
    """Print medians of what was measured."""
    data = size_of(Path(job["model"]))
    pages = "before every batch" if job["evict"] else "once"
    print(
        f"\n{job['size']} ({data / 1e9:.2f} GB), {job['sequences']} x {job['tokens']} tokens, "
        f"{job['rows']} rows a batch, pages dropped {pages}; medians of {options.rounds}\n"
        f"{'':<12}wall s   x ours    CPU s  read GB   x file   anonymous GB: peak, baseline, added"
    )
    middle = {
        name: {key: median(run[key] for run in runs) for key in runs[0] if key != "limit"}
        for name, runs in found.items()
    }
    for name, m in middle.items():
        ratio = m["wall"] / middle["ours"]["wall"] if "ours" in middle else float("nan")
        print(
            f"{name:<12}{m['wall']:>6.1f}{ratio:>9.2f}{m['cpu']:>9.1f}{m['read'] / 1e9:>9.2f}"
            f"{m['read'] / data:>9.2f}{m['peak'] / 1e9:>20.2f}{m['baseline'] / 1e9:>10.2f}"
            f"{(m['peak'] - m['baseline']) / 1e9:>7.2f}"
        )
    print(f"floor, read: {floors[True]:.1f} s with O_DIRECT, {floors[False]:.1f} s through cache")
    if {"ours", "ram"} <= set(middle):
        compute, read = middle["ram"]["wall"], min(floors.values())
        print(
            f"floor, compute: {compute:.1f} s; ours / max(read, compute) = "
            f"{middle['ours']['wall'] / max(compute, read):.2f}"
        )
    for name in (name for name in found if found[name][0]["limit"]):
        print(f"{name} ran with {found[name][0]['limit']}")


def agree(scratch: Path, reference: str, name: str) -> bool:
    """Compare the last round's answers with another engine's; tells, and gives whether they do."""
    import numpy

    def load(what: str) -> list:
        return [numpy.load(scratch / who / f"{what}.npy") for who in (reference, name)]

    def states(number: int) -> list:
        files = [scratch / who / f"hidden.{number}.bf16" for who in (reference, name)]
        raw = [numpy.fromfile(file, "u2").astype("u4") << 16 for file in files]
        return [values.view("f4") for values in raw]

    (ids, others), (log_probs, their_log_probs), (tail, their_tail) = map(
        load, ("ids", "log_probs", "tail")
    )
    # where the reference has several highest, any of them is right: bfloat16 logits tie often
    same = ((ids == others[:, :1]) & (log_probs == log_probs[:, :1])).any(1).mean()
    apart = abs(log_probs - their_log_probs)  # a step of bfloat16 is 0.25 for logits from 32 on
    tails = abs(tail - their_tail).max()
    strayed = max(
        abs(ours - theirs).max() / ours.std()
        for ours, theirs in (states(number) for number in range(3))
    )
    sound = (
        same > 0.99
        and apart.mean() < 0.01
        and apart.max() <= 0.5
        and tails < 0.01
        and strayed < 0.1
    )
    print(
        f"{'agree' if sound else 'DIFFER'}: {name} and {reference}: top-1 of {same:.2%} of "
        f"{len(ids)} positions; log-probs differ by {apart.mean():.5f}, {apart.max():.3f} at most, "
        f"tails by {tails:.5f}; "
        f"hidden states by {strayed:.4f} of their deviation"
    )
    return bool(sound)


if __name__ == "__main__":
    main()
