"""Teachers with larger heads: refused by the ids that they answer with, not by their padding."""

from pathlib import Path

import pytest
import torch

from stages.digests import write_manifest
from stages.distill.several import check_vocabulary
from stages.formats.targets import TeacherTargets
from tests.stages.lessons import rows, teacher, write_targets
from tests.stages.tiny_dag import TEACHER, make_tiny_dag
from tests.tiny import tiny_llama

GUEST, VOCABULARY = "smollm2-1-7b", 97  # the student's, of the tiny DAG


def larger_teacher():
    """One whose head has three times the tokens; as weights are random, it answers with them."""
    return tiny_llama(blocks=4, width=48, vocab=3 * VOCABULARY, seed=5)


def test_it_is_refused_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dag = make_tiny_dag(tmp_path / "dag", monkeypatch)
    dag.run("extract")
    own = dag.root / "artifacts/extract" / TEACHER
    tokens = TeacherTargets(own).rows(torch.arange(10)).tokens
    guest = own.with_name(GUEST)
    largest = write_targets(guest, larger_teacher(), tokens).largest_id()
    write_manifest(guest)
    assert largest >= VOCABULARY
    dag.set("distill", teacher_order=[TEACHER, GUEST])
    with pytest.raises(ValueError, match=f"{GUEST} hold token id {largest}.* 0 to 96 only"):
        dag.run("distill")
    assert not list((dag.root / "scratch/distill").rglob("*.safetensors"))


def test_a_head_that_is_larger_by_padding_alone_is_no_hindrance(tmp_path: Path) -> None:
    opened = {TEACHER: write_targets(tmp_path / "own", teacher(), rows(8))}
    opened[GUEST] = write_targets(tmp_path / "guest", larger_teacher(), rows(8))
    largest = opened[GUEST].largest_id()
    check_vocabulary(largest + 1, opened)
    with pytest.raises(ValueError, match=f"has ids 0 to {largest - 1} only; set distill.teacher_"):
        check_vocabulary(largest, opened)
