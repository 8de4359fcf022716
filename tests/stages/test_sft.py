"""sft as a whole stage: adapters that open again, the same bytes after a stop, clear refusals."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from modeling.lora import DeadAdapter, linear_layers, open_merged
from stages.digests import write_manifest
from stages.learning.finetuning import rows_loss
from stages.learning.student import open_student
from stages.learning.supervision import encode, lay_out
from stages.measuring.forgetting import Forgot
from stages.process import Stopped
from stages.sft.params import VARIANTS, Capability, OwnCourse, Params
from tests.runtime.conversing import letters
from tests.stages.skill_dag import (
    CALLED,
    HELD_OUT,
    PARAMS,
    PLAIN,
    capability,
    in_the_head,
    make_skill_dag,
)
from tests.stages.tiny_dag import TEACHER, StopAt, TinyDag

QUICK = {"learning_rate": 3e-2, "steps": 8, "forgetting": 10.0}  # learns much, and forgets
EXPERTS = {"after_block": 1, "experts": 2, "units": 4, "temperature": 0.7, "balance": 0.01}


@pytest.fixture
def dag(tmp_path: Path) -> TinyDag:
    return make_skill_dag(tmp_path)


def reopened(dag: TinyDag):
    """The student as the stages after sft find it."""
    made = dag.root / "artifacts"
    return open_student(made / "distill", {TEACHER: made / "profile" / TEACHER}, made / "prepare")


def student_with(dag: TinyDag, edit) -> None:
    """Change the distilled student's weights."""
    folder = dag.root / "artifacts/distill"
    model = reopened(dag).model
    edit(model)
    model.bfloat16().save_pretrained(folder / "student")
    write_manifest(folder)


# --- what it makes ---------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_adapter_teaches_and_opens_again_with_the_loss_that_was_reported(
    dag: TinyDag, variant: str
) -> None:
    dag.set("sft", **QUICK, capabilities=[capability("tools", PLAIN)], variant=variant)
    metrics = dag.run("sft")
    assert metrics["tools.heldout_loss"] < 0.7 * metrics["tools.heldout_loss_before"]
    model = open_merged(reopened(dag).model, dag.root / "artifacts/sft/tools")
    (example,) = [encode(in_the_head(told), letters()) for told in HELD_OUT[:1]]
    (rows,) = lay_out([example], 0, 256, packs=False)
    loss = rows_loss(model, rows).item() / sum(example.counted)
    assert loss == pytest.approx(metrics["tools.heldout_loss"], rel=2e-3)


def test_it_writes_an_adapter_a_capability_and_their_figures(dag: TinyDag) -> None:
    both = [capability("tools", CALLED), capability("sums", PLAIN, last_blocks=1)]
    dag.set("sft", capabilities=both)
    metrics = dag.run("sft")
    assert set(dag.published("sft")) == {
        "manifest.json", "sft.json",
        *(f"{name}/adapter_{end}" for name in ("tools", "sums")
          for end in ("config.json", "model.safetensors")),
    }  # fmt: skip
    measured = (
        "parameters", "heldout_loss_before", "heldout_loss", "rollbacks", "perplexity_ratio",
        "perplexity_ratio_low", "perplexity_ratio_high", "drift",
    )  # fmt: skip
    assert set(metrics) == {f"{name}.{key}" for name in ("tools", "sums") for key in measured}
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["sums.parameters"] == metrics["tools.parameters"] / 2  # one block of two
    facts = json.loads(dag.published("sft")["sft.json"])
    assert facts["sums"]["heldout_loss"] == pytest.approx(metrics["sums.heldout_loss"], abs=1e-6)
    assert facts["tools"]["conversations"] == 3  # of four, validation keeps one


def test_a_capability_may_take_a_course_of_its_own(dag: TinyDag) -> None:
    adapters = []
    short = {"steps": 2, "learning_rate": 1e-3, "general_weight": 0.5}
    for section, own in ((short, None), ({"steps": 9}, short)):
        dag.set("sft", **section, capabilities=[capability("tools", CALLED, course=own)])
        dag.run("sft")
        adapters.append(dag.published("sft")["tools/adapter_model.safetensors"])
    assert adapters[0] == adapters[1]


def test_an_adapter_says_nothing_of_the_process_and_the_folder_it_was_made_in(dag: TinyDag) -> None:
    """PEFT keeps the targets in a set, whose order is another in each process."""
    dag.set("sft", steps=1)
    dag.run("sft")
    config = json.loads(dag.published("sft")["tools/adapter_config.json"])
    assert config["target_modules"] == sorted(linear_layers(reopened(dag).model))
    assert config["base_model_name_or_path"] is None


# --- going on --------------------------------------------------------------------------------


def test_interrupted_and_resumed_it_gives_the_same_bytes(dag: TinyDag) -> None:
    dag.set(
        "sft",
        capabilities=[capability("tools", CALLED), capability("sums", PLAIN, experts=EXPERTS)],
        variant="pissa",
    )
    dag.run("sft")
    published = dag.published("sft")
    shutil.rmtree(dag.root / "scratch")
    shutil.rmtree(dag.root / "artifacts/sft")
    for phase, step in (("tools", 1), ("tools", 3), ("sums", 2), ("sums", 4)):
        with pytest.raises(Stopped, match=f"stopped at step {step} of 4"):
            dag.run("sft", StopAt(phase, step))
    dag.run("sft")
    assert dag.published("sft") == published


# --- what it refuses -------------------------------------------------------------------------


def test_conversations_that_prepare_did_not_make_are_named(dag: TinyDag) -> None:
    dag.set("sft", capabilities=[capability("tools", "poems")])
    with pytest.raises(FileNotFoundError, match=f"add 'poems' to prepare.*{PLAIN}"):
        dag.run("sft")


def test_a_text_without_held_out_rows_is_named(dag: TinyDag) -> None:
    dag.set("sft", general_text="poems")
    with pytest.raises(ValueError, match="'general_text' is 'poems'.*but of docs"):
        dag.run("sft")


def test_long_conversations_are_left_out_and_too_few_refused(dag: TinyDag, capsys) -> None:
    dag.set("sft", most_tokens=20)
    with pytest.raises(ValueError, match="has 0 conversations of at most 20 tokens"):
        dag.run("sft")
    assert "4 of 4 conversations are longer than most_tokens (20)" in capsys.readouterr().out


def test_an_adapter_that_forgets_too_much_is_refused_with_the_figures(dag: TinyDag) -> None:
    dag.set(
        "sft",
        **{**QUICK, "forgetting": 0.0},
        general_rows=0,
        capabilities=[capability("tools", PLAIN)],
    )
    with pytest.raises(Forgot, match="adapter 'tools': perplexity of general text is x.* at most"):
        dag.run("sft")
    assert not (dag.root / "artifacts/sft").exists()


def test_an_adapter_that_learns_nothing_is_refused(dag: TinyDag) -> None:
    """Behind an output of zeros no gradient comes through."""
    student_with(dag, lambda model: model.model.layers[1].self_attn.o_proj.weight.zero_())
    dag.set("sft", capabilities=[capability("tools", PLAIN, targets=["v_proj"])])
    with pytest.raises(DeadAdapter, match=r"1 of 2 adapted layers get no gradient.*layers\.1"):
        dag.run("sft")


def test_layers_that_the_student_does_not_have_are_named(dag: TinyDag) -> None:
    dag.set("sft", capabilities=[capability("tools", PLAIN, targets=["x_proj"])])
    with pytest.raises(ValueError, match="x_proj; LlamaForCausalLM has .*q_proj"):
        dag.run("sft")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"capabilities": ()}, "name at least one"),
        ({"capabilities": (Capability("a", ("b",), None, (), 0, None),) * 2}, "each once"),
        (
            {"capabilities": (Capability("a", ("b",), OwnCourse(0, 1e-3, 1.0), (), 0, None),)},
            "capability 'a', 'course': 'steps' is 0",
        ),
        ({"variant": "qlora"}, "must be one of lora, rslora, dora, pissa"),
        ({"rank": 0}, "'rank' is 0"),
    ],
)
def test_parameters_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    fields = {
        **PARAMS["sft"],
        "capabilities": (Capability("tools", (CALLED,), None, (), 0, None),),
        **changes,
    }
    with pytest.raises(ValueError, match=message):
        Params(**fields)


def test_a_capability_without_conversations_is_refused() -> None:
    with pytest.raises(ValueError, match="capability 'tools' has no 'conversations'"):
        Capability("tools", (), None, (), 0, None)
