"""Every way to build a student runs through the stage, and its folders are stock models."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from modeling.blocks import dissect
from modeling.loading import open_model
from stages.process import Stopped
from tests.stages.lessons import rows
from tests.stages.tiny_dag import StopAt, TinyDag, make_tiny_dag

STUDENTS = ("narrow-27", "narrow-30", "llama-7m", "mamba-7m")
MODELS = ("before_training", "student", "text_only")


@pytest.fixture
def dag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyDag:
    """The DAG up to distill."""
    dag = make_tiny_dag(tmp_path / "dag", monkeypatch)
    dag.run("extract")
    return dag


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(rows(2), use_cache=False).logits


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_of_any_construction_and_its_controls_are_stock_models(
    dag: TinyDag, name: str
) -> None:
    from transformers import AutoModelForCausalLM

    dag.set("distill", student=name, steps=3)
    metrics = dag.run("distill")
    folder = dag.root / "artifacts/distill"
    facts = json.loads((folder / "student.json").read_text(encoding="utf-8"))
    answers = {}
    for model in MODELS:
        stock = AutoModelForCausalLM.from_pretrained(folder / model, dtype=torch.float32)
        assert type(stock).__module__.startswith("transformers.")
        assert "auto_map" not in json.loads((folder / model / "config.json").read_text("utf-8"))
        assert metrics["parameters"] == sum(p.numel() for p in stock.parameters())
        assert metrics["blocks"] == len(dissect(stock).blocks)
        answers[model] = logits(stock.eval())
    assert all(torch.isfinite(answer).all() for answer in answers.values())
    for one, other in (MODELS[:2], MODELS[1:], MODELS[::2]):
        assert not torch.equal(answers[one], answers[other])
    if name.startswith("narrow"):
        assert stock.config.intermediate_size == 48 == facts["sizes"]["ffn"]
        assert len(facts["dropped"]) == metrics["blocks_dropped"] == 8 - metrics["blocks"]
        assert 0 <= metrics["mlp_explained"] <= 1 and len(facts["mlp_explained"]) == len(
            dissect(stock).blocks
        )
    else:
        assert stock.config.model_type == name.split("-")[0]
        assert "blocks_dropped" not in metrics


def test_a_narrower_student_starts_nearer_to_its_teacher_than_a_new_network(dag: TinyDag) -> None:
    wanted, apart = logits(open_model(dag.teacher_folder)).softmax(-1), {}
    for name in ("narrow-30", "llama-7m"):
        dag.set("distill", student=name, steps=1)
        dag.run("distill")
        model = open_model(dag.root / "artifacts/distill/before_training")
        apart[name] = (logits(model).softmax(-1) - wanted).abs().sum(-1).mean()
    assert apart["narrow-30"] < 0.85 * apart["llama-7m"]


@pytest.mark.parametrize("name", ["narrow-27", "llama-7m"])
def test_a_stage_that_was_stopped_publishes_the_same_bytes(dag: TinyDag, name: str) -> None:
    dag.set("distill", student=name, steps=3)
    dag.run("distill")
    expected = dag.published("distill")
    for folder in ("scratch", "artifacts"):
        shutil.rmtree(dag.root / folder / "distill")
    with pytest.raises(Stopped, match="step 2 of 3"):
        dag.run("distill", StopAt("student", 2))
    dag.run("distill")
    assert dag.published("distill") == expected


def test_a_teacher_unlike_llama_is_refused_before_anything_is_searched(dag: TinyDag) -> None:
    from tests.tiny import tiny_gpt2

    tiny_gpt2(blocks=8).bfloat16().save_pretrained(dag.teacher_folder)
    dag.set("distill", student="narrow-27", search_width=4)
    with pytest.raises(ValueError, match="GPT2Block has 0 q_proj.*'keep: null'"):
        dag.run("distill")
    assert not list((dag.root / "scratch/distill").rglob("search.json"))
