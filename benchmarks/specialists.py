"""Two specialists of SmolLM2-135M in sequence: arithmetic, then Python's documentation.

    .venv/bin/python benchmarks/specialists.py [--steps 30] [--prefix 24] [--ways replayed]

The same comparison as retention.py, on a real language model and without a network: two copies of
SmolLM2 go on with rows of one text each and become the teachers; a student, SmolLM2 less a block,
learns from their stored answers in sequence.

Made affordable on a CPU: rows of 64 tokens; teachers and student train the blocks behind `prefix`
and the final norm, the others, embedding and head stay; 32 rows of each skill are held out.

Measured (seed 0, 723 s of one processor): the teachers take arithmetic from 2.922 to 0.966 nats a
token and docs from 3.599 to 3.267. A student taught plainly in sequence keeps 78.5 % of arithmetic;
one that goes over a quarter of a batch of it again keeps 97.6 %, and docs cost it 0.8 %. Protected
subspaces alone (99 % of the inputs' squares, 61 % of directions) keep 100.0 % and cost docs 24.4 %.
"""

import argparse
import copy
import time

import torch
from sequences import WAYS, Skill, answer, behind, cross_entropy, learn_text, report, teach_all
from torch import Tensor

from modeling.blocks import drop_blocks
from modeling.loading import locate, open_model, open_tokenizer
from stages.prepare.arithmetic import training_problems
from stages.prepare.sources import python_docs

ROW_TOKENS, HELDOUT_ROWS = 64, 32


def main() -> None:
    """Make the specialists, teach the student, print the matrices."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default="smollm2-135m", help="a name in registry/teachers.yaml")
    parser.add_argument("--prefix", type=int, default=24, help="blocks that stay as they are")
    parser.add_argument("--rows", type=int, default=240, help="of each skill, to learn from")
    parser.add_argument("--teacher-steps", type=int, default=30)
    parser.add_argument("--teacher-rate", type=float, default=3e-4)
    parser.add_argument("--steps", type=int, default=30, help="a teacher")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--replay-share", type=float, default=0.25, help="of a row of the second")
    parser.add_argument("--share", type=float, default=0.99, help="of the inputs' squares")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["replayed"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    began = time.process_time()
    base = open_model(locate(options.base)).float()
    skills = [
        specialise(base, name, rows, options)
        for name, rows in read_texts(options.base, options.rows + HELDOUT_ROWS).items()
    ]
    student = copy.deepcopy(base)
    drop_blocks(student, [options.prefix])
    student.requires_grad_(False)
    outcome = teach_all(student, skills, options.seed, options)
    report(f"{options.base}, seed {options.seed}", [outcome])
    print(f"{time.process_time() - began:.0f} s of a processor")


def specialise(base, name: str, rows: Tensor, options) -> Skill:
    """Train a copy of the base on a skill's rows; give them with its answers."""
    heldout, rows = rows[:HELDOUT_ROWS], rows[HELDOUT_ROWS:]
    teacher = copy.deepcopy(base)
    named = behind(teacher, options.prefix)
    learn_text(teacher, named, rows, options.teacher_steps, options.seed, options.teacher_rate)
    before, after = cross_entropy(base, heldout), cross_entropy(teacher, heldout)
    print(f"{name}: base {before:.3f}, teacher {after:.3f}", flush=True)
    return Skill(name, rows, heldout, answer(teacher, rows))


def read_texts(base: str, count: int) -> dict[str, Tensor]:
    """Rows (count, ROW_TOKENS) of both skills, the first one's first. Raises ValueError."""
    tokenizer = open_tokenizer(locate(base))
    rows = {}
    for name, documents in (("arithmetic", training_problems(0)), ("docs", python_docs(0))):
        ids: list[int] = []
        for _, text in documents:
            ids += [*tokenizer.encode(text), tokenizer.eos_token_id]
            if len(ids) >= count * ROW_TOKENS:
                break
        else:
            raise ValueError(f"{name} has {len(ids) // ROW_TOKENS} rows; lower --rows ({count})")
        rows[name] = torch.tensor(ids[: count * ROW_TOKENS]).view(count, ROW_TOKENS)
    return rows


if __name__ == "__main__":
    main()
