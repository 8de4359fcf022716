"""toolformer as a whole stage: it finds calls, learns from them, and takes back what did harm."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from modeling.lora import open_merged
from stages.process import Stopped
from stages.toolformer.params import Params
from tests.stages.skill_dag import (
    CALLED,
    PARAMS,
    PLAIN,
    make_skill_dag,
    student,
    write_adapter,
)
from tests.stages.tiny_dag import StopAt, TinyDag

RECKLESS = {"learning_rate": 1.0, "general_rows": 0, "spike": 1e6, "regression": 1e6}
WEIGHTS = "tools/adapter_model.safetensors"


def begun(root: Path) -> TinyDag:
    """A DAG behind sft."""
    dag = make_skill_dag(root)
    write_adapter(dag, "sft")
    return dag


@pytest.fixture
def dag(tmp_path: Path) -> TinyDag:
    return begun(tmp_path)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyDag, dict[str, float]]:
    dag = begun(tmp_path_factory.mktemp("toolformer"))
    return dag, dag.run("toolformer")


# --- what it makes ---------------------------------------------------------------------------


def test_it_writes_an_adapter_its_figures_and_samples_to_check(done) -> None:
    dag, metrics = done
    published = dag.published("toolformer")
    assert set(published) == {
        "manifest.json", "toolformer.json", "samples.md", "tools/adapter_config.json", WEIGHTS,
    }  # fmt: skip
    assert set(metrics) == {
        "texts", "calls_written", "calls_judged", "calls_kept", "texts_with_calls",
        "calls_to_the_point", "adapter_kept", "probe_right_before", "probe_right",
        "probe_own_tokens_before", "probe_own_tokens", "perplexity_ratio", "drift",
    }  # fmt: skip
    assert all(math.isfinite(value) for value in metrics.values())
    facts = json.loads(published["toolformer.json"])
    assert facts["reverted"] is None and metrics["adapter_kept"] == 1
    assert [probe["step"] for probe in facts["probes"]] == [0, 4]
    assert "## Kept" in published["samples.md"].decode()
    assert '<<py>>{"code": "' in published["samples.md"].decode()


def test_calls_are_found_run_and_counted(done) -> None:
    _, metrics = done
    assert metrics["texts"] == 2 == metrics["calls_written"]
    assert 1 <= metrics["calls_kept"] <= metrics["calls_judged"] <= 2
    assert metrics["texts_with_calls"] == metrics["calls_kept"]
    assert metrics["probe_right_before"] == metrics["probe_right"] == 1


def test_its_adapter_opens_on_the_student_and_is_another_than_that_of_sft(done) -> None:
    dag, _ = done
    open_merged(student(), dag.root / "artifacts/toolformer/tools")
    assert dag.published("toolformer")[WEIGHTS] != dag.published("sft")[WEIGHTS]


def test_interrupted_and_resumed_it_gives_the_same_bytes(done, tmp_path: Path) -> None:
    calm, metrics = done
    dag = begun(tmp_path)
    with pytest.raises(Stopped, match="stopped at step 3 of 4"):
        dag.run("toolformer", StopAt("tools", 3))
    assert dag.run("toolformer") == metrics
    assert dag.published("toolformer") == calm.published("toolformer")


# --- what it takes back ----------------------------------------------------------------------


def test_when_fewer_probes_are_right_the_adapter_of_sft_stays(dag: TinyDag, capsys) -> None:
    dag.set("toolformer", **RECKLESS)
    metrics = dag.run("toolformer")
    assert metrics["adapter_kept"] == 0
    assert metrics["probe_right"] < metrics["probe_right_before"] == 1
    assert dag.published("toolformer")[WEIGHTS] == dag.published("sft")[WEIGHTS]
    assert "the adapter of sft stays: of the probes 0.0% [" in capsys.readouterr().out
    facts = json.loads(dag.published("toolformer")["toolformer.json"])
    assert facts["reverted"].endswith("were")


def test_when_text_is_forgotten_the_adapter_of_sft_stays(dag: TinyDag, capsys) -> None:
    dag.set("toolformer", forgetting=0.0, general_rows=0, learning_rate=3e-3)
    assert dag.run("toolformer")["adapter_kept"] == 0
    assert dag.published("toolformer")[WEIGHTS] == dag.published("sft")[WEIGHTS]
    said = capsys.readouterr().out
    assert "the adapter of sft stays: perplexity of docs is x" in said
    assert "times the student's" in said


@pytest.mark.parametrize("changes", [{"threshold": 100.0}, {"place_probability": 1.0}])
def test_when_no_call_helps_the_adapter_of_sft_stays(dag: TinyDag, changes: dict) -> None:
    dag.set("toolformer", **changes)
    metrics = dag.run("toolformer")
    assert (metrics["adapter_kept"], metrics["calls_kept"]) == (0, 0)
    assert dag.published("toolformer")[WEIGHTS] == dag.published("sft")[WEIGHTS]
    facts = json.loads(dag.published("toolformer")["toolformer.json"])
    assert facts["reverted"].startswith("no call made what follows likelier by")
    assert facts["tools"]


# --- what it refuses -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"capability": "magic"}, "'sft' taught no capability 'magic', but tools"),
        ({"probe_problems": 3}, "4 problems to learn from and 2 probes .* of which 3 are wanted"),
        ({"texts": [CALLED]}, "conversation '6x7' has calls already"),
        ({"most_tokens": 30}, "none of . texts with calls fits into 30 tokens"),
    ],
)
def test_what_cannot_be_done_is_refused(
    dag: TinyDag, changes: dict[str, Any], message: str
) -> None:
    dag.set("toolformer", **changes)
    with pytest.raises(ValueError, match=message):
        dag.run("toolformer")
    assert not (dag.root / "artifacts/toolformer").exists()


def test_texts_that_prepare_did_not_make_are_named(dag: TinyDag) -> None:
    dag.set("toolformer", texts=["poems"])
    with pytest.raises(FileNotFoundError, match=f"add 'poems' to prepare.*{PLAIN}"):
        dag.run("toolformer")


def test_without_sft_it_says_what_to_run_first(dag: TinyDag) -> None:
    shutil.rmtree(dag.root / "artifacts/sft")
    with pytest.raises(FileNotFoundError, match="run that stage first.*--stage sft"):
        dag.run("toolformer")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tools": ()}, "'tools' is empty"),
        ({"place_probability": 1.5}, "'place_probability' is 1.5"),
        ({"tries": 0}, "'tries' is 0"),
    ],
)
def test_parameters_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    fields = {**PARAMS["toolformer"], **changes}
    with pytest.raises(ValueError, match=message):
        Params(**fields)
