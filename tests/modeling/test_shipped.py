"""A shipped student elsewhere: stock transformers always, llama.cpp where it is installed.

NANOFOUNDRY_LLAMA_PYTHON=/path/to/python     an interpreter with llama-cpp-python
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.shipped import PROBE, ask, compare, our_answer
from modeling.export import export_gguf
from tests.modeling.test_export import VOCABULARY, saved
from tests.modeling.vocabularies import trained_bpe
from tests.tiny import tiny_llama, tiny_mamba

LLAMA = os.environ.get("NANOFOUNDRY_LLAMA_PYTHON")


@pytest.fixture(scope="module")
def llama_python() -> str:
    if not LLAMA:
        pytest.skip("NANOFOUNDRY_LLAMA_PYTHON names no interpreter with llama-cpp-python")
    done = subprocess.run([LLAMA, "-Ic", "import llama_cpp"], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"{LLAMA} cannot import llama_cpp")
    return LLAMA


def student(model, folder: Path) -> tuple[Path, Path, list[int]]:
    """A student's folder, and what is asked of it."""
    made = saved(model, trained_bpe(300), folder / "student")
    tokens = trained_bpe(300).encode(PROBE)[:40]
    request = folder / "request.json"
    request.write_text(json.dumps({"tokens": tokens, "text": PROBE}), encoding="utf-8")
    return made, request, tokens


def test_stock_transformers_gives_the_same_logits_without_a_module_of_ours(tmp_path) -> None:
    made, request, tokens = student(tiny_llama(vocab=VOCABULARY), tmp_path)
    theirs = ask(sys.executable, "logits_bare.py", made, request, tmp_path)
    ours = our_answer(made, tokens)
    assert theirs.facts["ours"] == []
    assert theirs.facts["tokens"] == ours.facts["tokens"]
    assert compare(ours, theirs)["largest"] < 1e-4


@pytest.mark.parametrize("make", [tiny_llama, tiny_mamba])
@pytest.mark.parametrize(("kind", "relative"), [("f32", 1e-4), ("q8_0", 0.1)])
def test_llama_cpp_gives_the_same_tokens_and_logits(
    tmp_path, llama_python, make, kind, relative
) -> None:
    made, request, tokens = student(make(vocab=VOCABULARY), tmp_path)
    export_gguf(made, tmp_path / "it.gguf", kind)
    theirs = ask(llama_python, "logits_llama.py", tmp_path / "it.gguf", request, tmp_path)
    ours = our_answer(made, tokens)
    assert theirs.facts["tokens"] == ours.facts["tokens"]
    assert compare(ours, theirs)["relative"] < relative
