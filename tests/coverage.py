"""Which architectures can be streamed: every causal-LM class of transformers, tiny, on one table.

    .venv/bin/python -m tests.coverage --write     survey all and write docs/architectures.md
    .venv/bin/python -m tests.coverage llama gpt2  look at some

For each: built tiny with random weights, saved, opened by from_pretrained in float32 and run; then
streamed from disk block by block. Exact means that every block's output and the logits equal those
of the normal forward to the bit, for two batches of different shapes. Resumed: so they do when the
passage is interrupted in the middle and goes on from stored states. Experts: whether a mixture's
experts are read only when they are routed to (modeling/experts.py), with the same bits.
"""

import argparse
import math
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.functional import linear

from modeling.blocks import find_units
from modeling.checkpoint import read_checkpoint
from modeling.gguf import architectures
from modeling.skeleton import build_skeleton
from modeling.streaming import Passage, linear_head
from modeling.weights import Streamed
from tests.causal_lms import MODEL_TYPES, CannotBuild, tiny_inputs, tiny_model

TABLE = Path(__file__).resolve().parents[1] / "docs" / "architectures.md"
HEADING = """# Architectures

Written by `python -m tests.coverage --write`; do not edit. transformers {version}.

{all} causal-LM classes: {built} could be built tiny, {exact} of them stream **equal to the bit** to
their normal forward (every block's output and the logits, float32 on a CPU, two batches of
different shapes); {resumed} go on from stored states when they are interrupted, the others from
their start. Of {mixtures} mixtures of experts, {routed} can be read by those experts alone that few
tokens are routed to, with the same bits; the others are read whole. Encoders of text, images, video
and speech, and encoder-decoders, pass through the same engine (tests/modeling/test_encoders.py).
"""
GGUF_HEADING = """
## GGUF

{all} architectures that the installed gguf package knows, as llama.cpp does. transformers has
classes for {named}: those stream from safetensors. For {opened} it maps names and layouts from
GGUF, so that a file of theirs can be opened as it is (converted once, a tensor at a time).
"""
FAULTS = (  # whatever a class of transformers raises is a finding
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError,
    RuntimeError, TypeError, ValueError,
)  # fmt: skip
Outputs = dict[tuple[int, int], Tensor]


@dataclass(frozen=True)
class Finding:
    """What became of one model type."""

    model_type: str
    class_name: str
    exact: bool
    resumed: str  # "exact", "from the start" or "" where nothing is exact
    remark: str
    experts: str = ""  # of a mixture: "routed" or "whole"


def survey(model_type: str) -> Finding:
    """Build, save, stream and compare one class."""
    try:
        model = tiny_model(model_type)
    except CannotBuild as reason:
        return Finding(model_type, "", False, "", f"cannot be built: {reason}")
    name = type(model).__name__
    inputs = [tiny_inputs(model, 2, 12, seed=0), tiny_inputs(model, 1, 7, seed=1)]
    try:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            return _compare(model_type, type(model), Path(folder), inputs)
    except FAULTS as error:
        if "--trace" in sys.argv:
            traceback.print_exc()
        return Finding(model_type, name, False, "", f"{type(error).__name__}: {error}"[:160])


def _compare(model_type: str, kind: type, folder: Path, inputs: list[Mapping[str, Any]]) -> Finding:
    reference = kind.from_pretrained(folder, dtype=torch.float32).eval()
    blocks, logits = whole_forward(reference, inputs)
    middle = len(find_units(reference)) // 2
    mixture = any(type(getattr(m, "num_experts", None)) is int for m in reference.modules())
    experts = "whole" if mixture else ""
    snapshot: dict[str, Tensor] = {}
    for tokens in (1, math.inf) if mixture else (math.inf,):
        found, streamed_logits, snapshot, routed = streamed(
            kind, folder, reference.config, inputs, middle, tokens=tokens
        )
        how = " when routed" if routed else ""
        if set(found) != set(blocks) or any(not torch.equal(found[k], blocks[k]) for k in blocks):
            remark = "a block's output differs" + how
            return Finding(model_type, kind.__name__, False, "", remark, experts)
        if any(not torch.equal(a, b) for a, b in zip(streamed_logits, logits, strict=True)):
            return Finding(model_type, kind.__name__, False, "", "logits differ" + how, experts)
        experts = "routed" if routed else experts
    if not snapshot:
        return Finding(model_type, kind.__name__, True, "from the start", "", experts)
    _, resumed, *_ = streamed(kind, folder, reference.config, inputs, None, snapshot)
    same = all(torch.equal(a, b) for a, b in zip(resumed, logits, strict=True))
    remark = "" if same else "wrong when resumed"
    return Finding(model_type, kind.__name__, same, "exact" if same else "", remark, experts)


@torch.no_grad()
def whole_forward(
    model, inputs: list[Mapping[str, Any]], read: Callable[[Any], Tensor] = lambda out: out.logits
) -> tuple[Outputs, list[Tensor]]:
    """Every block's last output, and the logits, by the model's normal forward."""
    outputs: Outputs = {}
    number = 0
    for index, block in enumerate(find_units(model)):

        def keep(_module: Any, _arguments: Any, output: Any, index: int = index) -> None:
            first = output[0] if isinstance(output, (tuple, list)) else output
            outputs[index, number] = first.clone()

        block.register_forward_hook(keep)
    logits = []
    for number, batch in enumerate(inputs):  # noqa: B007 (the hooks read it)
        logits.append(read(model(**batch)))
    return outputs, logits


@torch.no_grad()
def streamed(
    kind: type, folder: Path, config: Any, inputs: list[Mapping[str, Any]], stop: int | None,
    start: dict[str, Tensor] | None = None, tokens: float = math.inf,
) -> tuple[Outputs, list[Tensor], dict[str, Tensor], int]:  # fmt: skip
    """The same by streaming; a snapshot of the first batch being one block ahead at `stop`; and how
    many blocks' experts are read as that many tokens are routed to them."""
    checkpoint = read_checkpoint(folder)
    skeleton = build_skeleton(kind, config, checkpoint, torch.float32)
    weights = Streamed(skeleton, checkpoint, tokens)
    passage = Passage(skeleton.model, skeleton.blocks, weights, inputs)
    if start:
        passage.restore(start)
    outputs: Outputs = {}
    snapshot: dict[str, Tensor] = {}
    for arrival in passage.run():
        if arrival.block >= 0:
            outputs[arrival.block, arrival.batch] = arrival.hidden.clone()
        if arrival.block == stop and arrival.batch == 0:
            snapshot = {name: tensor.clone() for name, tensor in passage.snapshot().items()}
    if linear_head(passage.model) is None:
        return outputs, [f.output.logits for f in passage.forwards], snapshot, len(weights.routed)
    (_, head, bias) = next(weights.head())
    logits = []
    for forward in passage.forwards:
        logits.append(forward.finish(linear(forward.normed, head, bias)).logits)
    return outputs, logits, snapshot, len(weights.routed)


def main() -> None:
    """Survey and print, or write, the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("types", nargs="*", default=list(MODEL_TYPES))
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    parser.add_argument("--trace", action="store_true", help="show where a class fails")
    options = parser.parse_args()
    findings = []
    for model_type in options.types:
        findings.append(survey(model_type))
        print(findings[-1], flush=True)
    exact = sum(finding.exact for finding in findings)
    print(f"{exact} of {len(findings)} exact")
    if options.write:
        TABLE.write_text(as_document(findings), encoding="utf-8")


def as_document(findings: list[Finding]) -> str:
    """The table of docs/architectures.md."""
    built = [finding for finding in findings if finding.class_name]
    exact = [finding for finding in findings if finding.exact]
    known = architectures()
    opened = sum(architecture.opens for architecture in known)
    named = sum(architecture.model_type is not None for architecture in known)
    lines = [
        HEADING.format(
            version=transformers.__version__,
            all=len(findings),
            built=len(built),
            exact=len(exact),
            resumed=sum(f.resumed == "exact" for f in findings),
            mixtures=sum(bool(f.experts) for f in findings),
            routed=sum(f.experts == "routed" for f in findings),
        ),
        "| model type | class | streamed | interrupted, goes on | experts | |",
        "|---|---|---|---|---|---|",
        *(
            f"| {f.model_type} | {f.class_name} | {'exact' if f.exact else 'no'} | {f.resumed} | "
            f"{f.experts} | {f.remark} |"
            for f in findings
        ),
        GGUF_HEADING.format(all=len(known), named=named, opened=opened),
        "| GGUF architecture | in transformers | from GGUF |",
        "|---|---|---|",
        *(f"| {a.name} | {a.model_type or ''} | {'yes' if a.opens else ''} |" for a in known),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
