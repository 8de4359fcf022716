"""The real DAG behind distill in a folder of its own, with a student that calls tools.

dvc.yaml, registry and code are the real ones, and so are the tools (Python, for the server of calc
takes seconds to start). The student is a llama of two
small blocks that has learnt some problems by heart, so that it solves them with calls; what
prepare, profile and distill would have written is made here, and adapters where a test begins
behind sft or toolformer.
"""

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.nn.functional import cross_entropy

from modeling.lora import AdapterShape, adapt, save_adapter
from stages.digests import write_manifest
from stages.formats.conversations import Conversation, write_conversations
from stages.formats.importance import BlockImportance, write_importance
from stages.formats.tokens import write_rows, write_tokenizer
from stages.learning.supervision import encode
from tests.runtime.conversing import END, letters
from tests.stages.lessons import rows, subspaces_of
from tests.stages.tiny_dag import TEACHER, TinyDag
from tests.tiny import REPOSITORY, tiny_llama

CALLED, PLAIN, GENERAL = "sums-with-tools", "sums-in-the-head", "docs"
COURSE = {
    "steps": 4, "batch_conversations": 2, "general_rows": 1, "general_weight": 0.5,
    "most_tokens": 256, "packing": False,
    "learning_rate": 1e-3, "warmup": 0.1, "clip": 1.0, "validation_conversations": 1,
    "validate_every": 2, "spike": 3.0, "regression": 1.0, "forgetting": 0.5, "fast_path": True,
    "seed": 0, "general_text": GENERAL, "heldout_rows": 4,
}  # fmt: skip


def capability(name: str, *conversations: str, **changed: Any) -> dict[str, Any]:
    """An entry of sft.capabilities: an adapter on all layers, no experts."""
    fields = {"name": name, "conversations": [*conversations], "targets": [], "last_blocks": 0}
    return {**fields, "course": None, "experts": None, **changed}


PARAMS: dict[str, dict[str, Any]] = {
    "route": {
        "capabilities": ["tools", "devops"], "queries": 6, "blocks": [1, 2], "hidden": 8,
        "steps": 60, "batch_queries": 16, "learning_rate": 1e-2, "weight_decay": 0.01,
        "z_loss": 1e-4, "diversity": 0.01, "confidence": 0.0, "validation_share": 0.3,
        "answered": 0.95, "seed": 0,
    },
    "sft": {
        **COURSE,
        "trainer": "own", "capabilities": [capability("tools", CALLED)],
        "rank": 2, "alpha": 4.0, "variant": "lora",
    },
    "toolformer": {
        **COURSE, "capability": "tools", "conversations": [CALLED], "texts": [PLAIN],
        "most_texts": 2, "tools": ["py"], "places": 1, "place_probability": 0.05, "tries": 1,
        "following_tokens": 8, "threshold": 0.5, "probe_problems": 2,
    },
    "grpo": {
        "capability": "tools", "conversations": [CALLED], "steps": 3, "prompts": 2,
        "candidates": 3, "iterations": 2, "temperature": 1.2, "top_p": 1.0, "max_own_tokens": 48,
        "max_calls": 2, "most_tokens": 256, "learning_rate": 1e-4, "warmup": 0.1, "clip": 0.5,
        "loss": "dr_grpo", "epsilon": 0.2, "beta": 0.02,
        "rewards": {
            "correctness": 1.0, "format": 0.2, "brevity": 0.5, "symbols": 0.0, "citation": 0.0,
            "judge": 0.0,
        },
        "judge": "", "probe_problems": 2, "probe_every": 2, "general_text": GENERAL,
        "heldout_rows": 4, "forgetting": 0.5, "seed": 0,
    },
}  # fmt: skip


def problem(left: int, right: int, template: int) -> Conversation:
    """A product, worked out by Python."""
    product = str(left * right)
    segments = (
        ("prompt", f"{left}*{right}?"),
        ("own", f'<<py>>{{"code": "{left}*{right}"}}'),
        ("result", f"<<result>>{product}\n"),
        ("own", f"FINAL: {product}"),
    )
    facts = {"operation": "*", "template": template, "steps": 1}
    return Conversation(f"{left}x{right}", "arithmetic", segments, product, facts)


def in_the_head(told: Conversation) -> Conversation:
    """The same problem, answered without a call."""
    segments = (told.segments[0], ("own", f"FINAL: {told.answer}"))
    return Conversation(told.id, told.capability, segments, told.answer)


KNOWN = [problem(6, 7, 0), problem(12, 34, 1), problem(5, 9, 2), problem(8, 3, 3)]
HELD_OUT = [problem(4, 4, 0), problem(2, 9, 1), problem(7, 7, 2), problem(3, 5, 3)]


@cache
def student():
    """A tiny llama that solves KNOWN and HELD_OUT with calls, by heart, and knows the text."""
    model = tiny_llama(blocks=2).requires_grad_(True)
    model.config.eos_token_id = model.generation_config.eos_token_id = END
    examples = [encode(told, letters()) for told in (*KNOWN, *HELD_OUT)]
    width = max(map(len, examples))
    tokens = torch.full((len(examples), width), END)
    counted = torch.zeros(len(examples), width, dtype=torch.bool)
    for row, example in enumerate(examples):
        tokens[row, : len(example)] = torch.tensor(example.tokens)
        counted[row, : len(example)] = torch.tensor(example.counted)
    general = rows(24)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(400):
        logits = model(tokens[:, :-1]).logits
        loss = cross_entropy(logits[counted[:, 1:]], tokens[:, 1:][counted[:, 1:]])
        text = cross_entropy(model(general[:, :-1]).logits.flatten(0, 1), general[:, 1:].flatten())
        if loss < 0.02 and text < 0.2:
            break
        (loss + text).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.05 and text < 0.4, f"not learnt: losses {loss} and {text}"
    return model.eval().requires_grad_(False)


def make_skill_dag(root: Path) -> TinyDag:
    """Write what distill and the stages before it would have made into a folder."""
    dag = TinyDag(root)
    for name in ("stages", "modeling", "registry", "runtime", "dvc.yaml"):
        (root / name).symlink_to(REPOSITORY / name)
    (root / "params.yaml").write_text(yaml.safe_dump(PARAMS), encoding="utf-8")
    _write_prepared(root / "artifacts/prepare")

    profile = root / "artifacts/profile" / TEACHER
    profile.mkdir(parents=True)
    found = [BlockImportance(n, 1.0, 0.0, 10.0, 0.1, 1, 2, 3) for n in range(2)]
    write_importance(profile, found, subspaces_of(student(), rows(6)))
    write_manifest(profile)

    distilled = root / "artifacts/distill"
    copy.deepcopy(student()).bfloat16().save_pretrained(distilled / "student")
    letters().save_pretrained(distilled / "student")
    facts = {"teacher": TEACHER, "dropped": []}
    (distilled / "student.json").write_text(json.dumps(facts), encoding="utf-8")
    write_manifest(distilled)
    return dag


def write_adapter(dag: TinyDag, stage: str, seed: int = 0) -> None:
    """An adapter that changes nothing yet, as sft or toolformer might have left it."""
    folder = dag.root / "artifacts" / stage
    adapted = adapt(copy.deepcopy(student()), AdapterShape(2, 4.0, "lora"), seed, folder / "start")
    save_adapter(adapted, folder / "tools", folder / "start")
    write_manifest(folder)


def _write_prepared(folder: Path) -> None:
    for split, count in (("train", 8), ("heldout", 5)):
        write_rows(folder, split, GENERAL, rows(count, start=len(split)).numpy())
    write_tokenizer(folder, TEACHER, letters())
    write_conversations(folder, CALLED, "train", KNOWN)
    write_conversations(folder, CALLED, "heldout", HELD_OUT)
    write_conversations(folder, PLAIN, "train", map(in_the_head, KNOWN))
    write_conversations(folder, PLAIN, "heldout", map(in_the_head, HELD_OUT))
    write_manifest(folder)
