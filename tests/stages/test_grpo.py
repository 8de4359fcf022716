"""grpo as a whole stage: live tools, the same bytes after a stop, and harm that is taken back."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from modeling.lora import open_merged
from registry.catalog import UnknownName
from stages.grpo.params import Params, RewardWeights
from stages.process import Stopped
from tests.stages.skill_dag import PARAMS, make_skill_dag, student, write_adapter
from tests.stages.tiny_dag import StopAt, TinyDag

WEIGHTS = "tools/adapter_model.safetensors"


def begun(root: Path) -> TinyDag:
    """A DAG behind toolformer."""
    dag = make_skill_dag(root)
    write_adapter(dag, "toolformer")
    return dag


def curve(dag: TinyDag) -> list[dict[str, Any]]:
    """The lines of grpo's newest metrics.jsonl, without the time they were written at."""
    (file,) = (dag.root / "scratch/grpo").glob("*/metrics.jsonl")
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [{key: line[key] for key in line if key != "time_s"} for line in lines]


@pytest.fixture
def dag(tmp_path: Path) -> TinyDag:
    return begun(tmp_path)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyDag, dict[str, float]]:
    dag = begun(tmp_path_factory.mktemp("grpo"))
    return dag, dag.run("grpo")


# --- what it makes ---------------------------------------------------------------------------


def test_it_writes_an_adapter_that_opens_and_its_probes(done) -> None:
    dag, metrics = done
    published = dag.published("grpo")
    assert set(published) == {"manifest.json", "grpo.json", "tools/adapter_config.json", WEIGHTS}
    open_merged(student(), dag.root / "artifacts/grpo/tools")
    assert published[WEIGHTS] != dag.published("toolformer")[WEIGHTS]
    assert set(metrics) == {
        "adapter_kept", "probe_right_before", "probe_right", "probe_own_tokens_before",
        "probe_own_tokens", "perplexity_ratio", "drift",
    }  # fmt: skip
    assert all(math.isfinite(value) for value in metrics.values())
    facts = json.loads(published["grpo.json"])
    assert facts["reverted"] is None and metrics["adapter_kept"] == 1
    assert [probe["step"] for probe in facts["probes"]] == [0, 2, 3]  # every second, and the last


def test_its_curve_says_what_was_rewarded_and_how_far_the_policy_went(done) -> None:
    lines = curve(done[0])
    assert [line["step"] for line in lines] == [1, 2, 3]
    seen = {
        "reward", "reward_correctness", "reward_format", "reward_brevity", "own_tokens",
        "groups_used", "cut_off",
    }  # fmt: skip
    assert all(seen <= set(line) for line in lines)
    learnt = [line for line in lines if line["groups_used"]]
    assert learnt and all({"loss", "kl", "entropy", "clipped", "gradient_norm"} <= set(line)
                          for line in learnt)  # fmt: skip
    assert [step for step, line in enumerate(lines, 1) if "probe_right" in line] == [2, 3]


def test_tools_were_really_called(done) -> None:
    (log,) = (done[0].root / "scratch/grpo").glob("*/calls.jsonl")
    calls = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert {"tool": "py", "value": 16} in [{k: call.get(k) for k in ("tool", "value")}
                                           for call in calls]  # fmt: skip


@pytest.mark.slow
def test_interrupted_and_resumed_it_gives_the_same_bytes(done, tmp_path: Path) -> None:
    """Rollouts included: what was drawn in a step does not depend on the process it is drawn in."""
    calm, metrics = done
    dag = begun(tmp_path)
    for step in (1, 2):
        with pytest.raises(Stopped, match=f"stopped at step {step} of 3"):
            dag.run("grpo", StopAt("main", step))
    assert dag.run("grpo") == metrics
    assert dag.published("grpo") == calm.published("grpo")
    assert curve(dag) == curve(calm)


# --- what it takes back ----------------------------------------------------------------------


def test_when_fewer_probes_are_right_the_adapter_of_toolformer_stays(dag: TinyDag, capsys) -> None:
    dag.set("grpo", learning_rate=1.0)
    metrics = dag.run("grpo")
    assert metrics["adapter_kept"] == 0
    assert metrics["probe_right"] < metrics["probe_right_before"] == 1
    assert dag.published("grpo")[WEIGHTS] == dag.published("toolformer")[WEIGHTS]
    assert "the adapter of toolformer stays: of the probes 0.0% [" in capsys.readouterr().out
    assert json.loads(dag.published("grpo")["grpo.json"])["reverted"].endswith("were")


def test_when_text_is_forgotten_the_adapter_of_toolformer_stays(dag: TinyDag, capsys) -> None:
    dag.set("grpo", forgetting=0.0, learning_rate=3e-3, steps=1)
    assert dag.run("grpo")["adapter_kept"] == 0
    assert dag.published("grpo")[WEIGHTS] == dag.published("toolformer")[WEIGHTS]
    assert "the adapter of toolformer stays: perplexity of docs is x" in capsys.readouterr().out


# --- what it refuses -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"capability": "magic"}, "'toolformer' taught no capability 'magic', but tools"),
        ({"probe_problems": 3}, "4 problems to learn from and 2 probes .* of which 3 are wanted"),
        ({"general_text": "poems"}, "'general_text' is 'poems'.*but of docs"),
    ],
)
def test_what_cannot_be_done_is_refused(
    dag: TinyDag, changes: dict[str, Any], message: str
) -> None:
    dag.set("grpo", **changes)
    with pytest.raises(ValueError, match=message):
        dag.run("grpo")
    assert not (dag.root / "artifacts/grpo").exists()


def weights(**changed: float) -> dict[str, float]:
    return {**PARAMS["grpo"]["rewards"], **changed}


def params(**changes: Any) -> Params:
    fields = {**PARAMS["grpo"], "rewards": RewardWeights(**weights()), **changes}
    return Params(**fields)


def test_a_judge_that_weighs_but_is_not_named_is_refused() -> None:
    with pytest.raises(ValueError, match="'judge' is empty, but rewards.judge weighs 0.01"):
        params(rewards=RewardWeights(**weights(judge=0.01)))
    with pytest.raises(UnknownName, match="unknown teacher 'smollm'"):
        params(rewards=RewardWeights(**weights(judge=0.01)), judge="smollm")
    assert params(rewards=RewardWeights(**weights(judge=0.01)), judge="smollm2-135m")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"correctness": 0.1}, "being right has to weigh more"),
        ({"judge": 0.5}, "it may only break ties"),
        ({"brevity": -1.0}, "numbers from 0 on"),
    ],
)
def test_weights_by_which_a_wrong_answer_could_win_are_refused_before_anything_runs(
    changes: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        RewardWeights(**weights(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"candidates": 1}, "'candidates' is 1; it must be at least 2"),
        ({"loss": "ppo"}, "must be one of grpo, dr_grpo, dapo"),
        ({"conversations": ()}, "'conversations' is empty"),
    ],
)
def test_parameters_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        params(**changes)
