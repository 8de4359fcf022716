"""Extract with vLLM: refused where it cannot run; and a shard like any other where it does.

vLLM is a stand-in here that answers by a table; test_vllm_engine.py has the real one.
"""

import shutil
import sys
from pathlib import Path

import pytest
import torch

import modeling.backends
from modeling.answers import Answers
from stages.formats.targets import TeacherTargets
from stages.process import Stopped
from tests.modeling.test_vllm_engine import StandIn
from tests.stages.tiny_dag import TEACHER, StopAt, TinyDag, make_tiny_dag


@pytest.fixture
def dag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyDag:
    dag = make_tiny_dag(tmp_path, monkeypatch)
    dag.set("extract", engine="vllm", prefix_depth=0.0, anchors=0)
    return dag


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn(torch.randn(97, 97) * 3)
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    monkeypatch.setattr(modeling.backends, "what_is_missing", lambda package: [])
    return stand_in


def test_without_vllm_it_is_refused_before_anything_is_opened(
    dag: TinyDag, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    shutil.rmtree(dag.teacher_folder)
    with pytest.raises(ValueError, match="extract.engine 'vllm' needs vllm; .*pip install 'vllm"):
        dag.run("extract")
    assert dag.published("extract") == {}


@pytest.mark.parametrize("changed", [{"prefix_depth": 0.3}, {"anchors": 1}, {"answers": "sampled"}])
def test_what_vllm_cannot_give_is_refused_by_name(dag: TinyDag, vllm: StandIn, changed) -> None:
    dag.set("extract", **changed)
    with pytest.raises(ValueError, match="'engine' is 'vllm', which gives the most likely next"):
        dag.run("extract")


def test_targets_are_vllms_answers_and_teach(dag: TinyDag, vllm: StandIn) -> None:
    metrics = dag.run("extract")
    targets = TeacherTargets(dag.root / "artifacts/extract" / TEACHER)
    header = targets.header
    assert (header.rows, header.prefix_blocks, header.anchors, header.samples) == (10, 0, (), 0)
    batch = targets.rows(torch.arange(10))
    expected = Answers.of(vllm.logits[batch.tokens].flatten(0, 1), 16).targets()
    assert torch.equal(batch.targets.ids.flatten(0, 1), expected.ids)
    close = {"atol": 1e-2, "rtol": 1e-3}  # of float16
    torch.testing.assert_close(batch.targets.log_probs.flatten(0, 1), expected.log_probs, **close)
    torch.testing.assert_close(batch.targets.tail.flatten(), expected.tail, atol=1e-3, rtol=1e-2)
    assert metrics["top_k_mass"] == pytest.approx(1 - expected.tail.mean().item(), abs=1e-3)
    dag.set("distill", anchor_weight=0.0, controls=[], steps=2)
    assert dag.run("distill")["tokens_trained"] == 2 * 3 * 16


def test_an_interrupted_extraction_asks_for_no_row_twice(dag: TinyDag, vllm: StandIn) -> None:
    dag.run("extract")
    expected, asked = dag.published("extract"), vllm.asked
    shutil.rmtree(dag.root / "scratch")
    vllm.asked = []
    with pytest.raises(Stopped, match="step 2 of 3"):
        dag.run("extract", StopAt("main", 2))
    dag.run("extract")
    assert vllm.asked == asked and dag.published("extract") == expected


def test_more_tokens_than_the_vocabulary_has_are_refused_by_name(
    dag: TinyDag, vllm: StandIn
) -> None:
    dag.set("extract", top_k=98)
    with pytest.raises(ValueError, match="top_k.*97"):
        dag.run("extract")
