"""Whether a student is the same model elsewhere: in stock transformers, and in llama.cpp.

    .venv/bin/python benchmarks/shipped.py artifacts/distill/student
    .venv/bin/python benchmarks/shipped.py STUDENT --llama-python /path/to/python --types bf16 q8_0

The same token ids go through the student as this project opens it, through transformers in an
interpreter that imports nothing of ours (made on the spot with torch, transformers and safetensors
alone, or named by --bare-python), and, as GGUF files, through llama.cpp, if --llama-python names an
interpreter with llama-cpp-python. Logits are compared at every position, and so are the tokens that
each makes of a probe text.

SmolLM2-135M less 6 blocks, not trained after that, 128 tokens, llama-cpp-python 0.3.36 (all tokens
the same everywhere):

    transformers 5.23, nothing of ours loaded     the same bits
    llama.cpp f32     455 MB   relative 9e-6   top-1 100 %     KL 1e-10
    llama.cpp bf16    228 MB            1e-2          98.4 %      5e-4
    llama.cpp q8_0    122 MB            9e-2          81.3 %      3e-2
    llama.cpp q4_1     85 MB            1e-1          86.7 %      2e-2
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modeling.export import TYPES, export_gguf
from modeling.loading import open_model, open_tokenizer

HERE, REPOSITORY = Path(__file__).parent, Path(__file__).resolve().parents[1]
PROBE = """def area(radius):
    \"\"\"The area of a circle; it's 3.14159 * r ** 2, isn't it?\"\"\"
    return 3.14159 * radius ** 2   # 1,234,567.89 metres\u00b2

Naïve café: 你好, 世界! We'll see 🙂\t\tthe \u00dcbergr\u00f6\u00dfe of 2026-11-22.\r\n
    ...and so on.
"""


@dataclass(frozen=True)
class Answer:
    """What some program made of a student."""

    logits: Tensor  # (T, V)
    facts: dict[str, Any]


def ask(python: str | Path, script: str, student: Path, request: Path, folder: Path) -> Answer:
    """Run a script of this folder in another interpreter, without our paths or environment.

    Raises RuntimeError with the last line of what it complained about.
    """
    logits = folder / "logits.npy"
    files = map(str, (HERE / script, student, request, logits))
    command = [str(Path(python).absolute()), "-I", *files]  # -I: no paths, no variables of ours
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise RuntimeError(f"{script} in {python} could not run {student}: {last}")
    return Answer(torch.from_numpy(np.load(logits)), json.loads(done.stdout.splitlines()[-1]))


def bare_python(folder: Path) -> Path:
    """A fresh environment with what a folder of transformers needs, and nothing of ours."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    wanted = ["torch", "transformers", "safetensors"]
    limits = ["-q", "-c", str(REPOSITORY / "constraints.txt")]
    subprocess.run([str(folder / "bin/pip"), "install", *limits, *wanted], check=True)
    return folder / "bin/python"


@torch.no_grad()
def our_answer(student: Path, tokens: list[int]) -> Answer:
    """The student as this project opens it, in float32."""
    logits = open_model(student).float()(torch.tensor([tokens])).logits[0]
    return Answer(logits, {"tokens": open_tokenizer(student).encode(PROBE)})


def compare(ours: Answer, theirs: Answer) -> dict[str, float]:
    """How far other logits are from ours."""
    difference = (theirs.logits - ours.logits).abs()
    wanted, found = (a.logits.double().log_softmax(-1) for a in (ours, theirs))  # float32 is off
    return {  # by 2e-4 over a vocabulary of 49,152
        "largest": difference.max().item(),
        "relative": (difference.norm() / ours.logits.norm()).item(),
        "agreement": (theirs.logits.argmax(-1) == ours.logits.argmax(-1)).float().mean().item(),
        "kl": (wanted.exp() * (wanted - found)).sum(-1).mean().item(),
    }


def show(where: str, size: int, ours: Answer, theirs: Answer) -> None:
    """Print a line of the table."""
    found = compare(ours, theirs)
    same = "same" if theirs.facts["tokens"] == ours.facts["tokens"] else "OTHERS"
    print(
        f"{where:<18}{size / 1e6:>8.1f}{found['largest']:>12.2e}{found['relative']:>11.1e}"
        f"{found['agreement']:>9.2%}{found['kl']:>11.1e}  {same:<7} {theirs.facts['with']}",
        flush=True,
    )


def main(arguments: list[str]) -> int:
    """Compare everywhere, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("student", type=Path, help="a transformers folder")
    parser.add_argument("--bare-python", type=Path, help="an interpreter with transformers")
    parser.add_argument("--llama-python", type=Path, help="an interpreter with llama_cpp")
    parser.add_argument("--types", nargs="+", choices=TYPES, default=["f32", "bf16", "q8_0"])
    parser.add_argument("--tokens", type=int, default=128, help="of the probe text, repeated")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    tokens = open_tokenizer(options.student).encode(PROBE)
    tokens = (tokens * (options.tokens // len(tokens) + 1))[: options.tokens]
    with tempfile.TemporaryDirectory(prefix="shipped-") as name:
        folder, student = Path(name), options.student.resolve()
        request = folder / "request.json"
        request.write_text(json.dumps({"tokens": tokens, "text": PROBE}), encoding="utf-8")
        ours = our_answer(student, tokens)
        print("where                   MB  largest dif.   relative  top-1       KL  tokens")
        bare = options.bare_python or bare_python(folder / "bare")
        weights = sum(file.stat().st_size for file in student.glob("*.safetensors"))
        stock = ask(bare, "logits_bare.py", student, request, folder)
        show("transformers", weights, ours, stock)
        print(
            f"  modules of ours that were loaded there: {', '.join(stock.facts['ours']) or 'none'}"
        )
        for kind in options.types if options.llama_python else []:
            file = folder / f"{kind}.gguf"
            export_gguf(student, file, kind)
            theirs = ask(options.llama_python, "logits_llama.py", file, request, folder)
            show(f"llama.cpp {kind}", file.stat().st_size, ours, theirs)
            file.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
