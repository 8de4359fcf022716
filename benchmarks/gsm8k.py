"""GSM8K's test problems (Cobbe 2021): the student alone, and with an adapter that calls tools.

    NANOFOUNDRY_DATA=../shared/data .venv/bin/python benchmarks/gsm8k.py \\
        artifacts/distill/student artifacts/sft/tools artifacts/grpo/tools [--problems 200]

Greedy answers with live tools; right is the last line `FINAL: n`. With --lenient the last number of
an answer counts as well, so that a model which was never taught the form is not called wrong for
it. Shares with Wilson intervals; each adapter against the student, by McNemar's test.

Measured (laptop's student, seed 0, --own-tokens 96): alone 0.0 % [0.0, 0.3] of 1,319, with sft's
adapter 1.6 % [1.0, 2.4] at 2.0 calls an answer: it is taught few problems of several steps.
"""

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path

import torch

from modeling.loading import open_model, open_tokenizer
from modeling.skills import open_skilled
from runtime.generation.answers import Sampling
from runtime.generation.engine import Engine
from runtime.tools.dispatch import Tools
from stages.formats.answers import same_answer
from stages.formats.conversations import Conversation
from stages.measuring.solving import Solved, solve
from stages.measuring.statistics import Share, mcnemar

AT_ONCE = 32
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def main() -> None:
    """Solve the same problems with each model, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("student", type=Path, help="a folder with a model")
    parser.add_argument("adapters", type=Path, nargs="*", help="folders with adapters of it")
    parser.add_argument("--problems", type=int, default=1319, help="the first ones (all 1,319)")
    parser.add_argument("--own-tokens", type=int, default=160, help="an answer at most (160)")
    parser.add_argument("--lenient", action="store_true")
    options = parser.parse_args()
    problems = read_problems()[: options.problems]
    tokenizer, student = open_tokenizer(options.student), open_model(options.student)
    sampling = Sampling(0.0, 1.0, options.own_tokens, 8, 0)
    print(f"{'model':<32}{'right':>24}{'own tokens':>12}{'calls':>8}{'p':>9}{'core-s':>9}")
    first: list[bool] | None = None
    with Tools() as tools:
        for adapter in (None, *options.adapters):
            began = time.process_time()
            model = open_skilled(student, adapter) if adapter else student
            engine = Engine(model, tokenizer, tools)
            parts = solve(engine, tokenizer, problems, sampling, AT_ONCE)
            solved = [one for part in parts for one in part]
            right = judge(solved, problems, options.lenient)
            first = right if first is None else first
            share, p = Share(sum(right), len(right)), mcnemar(first, right)
            own = sum(one.own_tokens for one in solved) / len(solved)
            calls = sum(one.calls for one in solved) / len(solved)
            spent = time.process_time() - began
            name = "/".join(adapter.parts[-2:]) if adapter else "the student alone"
            print(f"{name:<32}{share!s:>24}{own:>12.1f}{calls:>8.2f}{p:>9.2g}{spent:>9.0f}")


def read_problems() -> list[Conversation]:
    """The test split, from $NANOFOUNDRY_DATA/gsm8k/test.jsonl."""
    path = Path(os.environ.get("NANOFOUNDRY_DATA", "../shared/data")) / "gsm8k" / "test.jsonl"
    if not path.is_file():
        sys.exit(f"{path} is not there; set NANOFOUNDRY_DATA to a folder with gsm8k/test.jsonl")
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [
        Conversation(
            id=str(number),
            capability="arithmetic",
            segments=(("prompt", row["question"]), ("own", "#")),
            answer=row["answer"].rpartition("####")[2].strip().replace(",", ""),
        )
        for number, row in enumerate(rows)
    ]


def judge(solved: list[Solved], problems: list[Conversation], lenient: bool) -> list[bool]:
    """Which are right; leniently by the last number that was written."""
    if not lenient:
        return [one.right for one in solved]
    found = [NUMBER.findall(one.text) for one in solved]
    return [
        one.right or bool(numbers and same_answer(numbers[-1], problem.answer))
        for one, numbers, problem in zip(solved, found, problems, strict=True)
    ]


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    main()
