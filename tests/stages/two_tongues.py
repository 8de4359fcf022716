"""The tiny DAG with a second teacher, whose tokenizer is another than the rows'.

Both read bytes: the rows' BPE has 330 tokens, the guest's 420 and another order of them.
"""

from pathlib import Path

import numpy as np
import pytest
import yaml

from registry.catalog import FOLDER, lookup
from stages.digests import write_manifest
from stages.formats.tokens import write_rows, write_tokenizer
from tests.modeling.vocabularies import CORPUS, trained_bpe
from tests.stages.tiny_dag import TEACHER, TinyDag, make_tiny_dag
from tests.tiny import tiny_llama

GUEST, ROW_TOKENS = "guest", 16
PROFILE = {
    "ablation_rows": 2, "covariance_rows": 4, "batch_rows": 2, "subspace_rank": 8,
    "control_blocks": 1, "resamples": 100, "engine": "resident", "seed": 0,
}  # fmt: skip


def make_two_tongues(root: Path, patch: pytest.MonkeyPatch) -> TinyDag:
    """The tiny DAG with rows of real text, and a guest in its registry."""
    dag = make_tiny_dag(root, patch)
    patch.setattr(lookup, "__defaults__", (root / "registry",))  # the copy, which has the guest
    entries = yaml.safe_load((FOLDER / "teachers.yaml").read_text(encoding="utf-8"))
    entries[GUEST] = entries[TEACHER] | {"tokenizer": "another"}
    registry = root / "registry/teachers.yaml"
    registry.write_text(yaml.safe_dump(entries, sort_keys=False), encoding="utf-8")
    own, other = trained_bpe(330), trained_bpe(420)
    guest = dag.teacher_folder.with_name(dag.teacher_folder.name.replace(TEACHER, GUEST))
    for folder, tokenizer, seed in ((dag.teacher_folder, own, 0), (guest, other, 3)):
        model = tiny_llama(blocks=8, vocab=len(tokenizer), seed=seed).bfloat16()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    prepared = root / "artifacts/prepare"
    for path in prepared.glob("tokens/*/*.npy"):
        path.unlink()
    ids = [n for text in CORPUS for n in [*own(text)["input_ids"], own.eos_token_id]]
    cut = np.array(ids[: len(ids) // ROW_TOKENS * ROW_TOKENS]).reshape(-1, ROW_TOKENS)
    for split, first, count in (("train", 0, 10), ("calibration", 10, 6), ("heldout", 16, 4)):
        write_rows(prepared, split, "docs", cut[first : first + count])
    write_tokenizer(prepared, TEACHER, own)
    write_manifest(prepared)
    params = yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8"))
    params |= {"profile": PROFILE, "teachers": [TEACHER, GUEST]}
    (root / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    return dag
