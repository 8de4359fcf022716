"""sft by TRL's SFTTrainer: the own loop's curve, the same bytes after a stop, unsloth beside it.

NANOFOUNDRY_TRL_PYTHON=/path/to/python     an interpreter with trl and this project's packages
"""

import importlib.util
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from modeling.backends import what_is_missing
from stages.sft.params import Capability, Experts, Params, check_trainer
from tests.stages.skill_dag import CALLED, PARAMS, make_skill_dag
from tests.stages.trl_lessons import LESSONS, STEPS
from tests.tiny import REPOSITORY

TRL = os.environ.get("NANOFOUNDRY_TRL_PYTHON")
EXPERTS = Experts(1, 2, 4, 0.7, 0.01)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What tests/stages/trl_training.py has found."""
    if not TRL:
        pytest.skip("NANOFOUNDRY_TRL_PYTHON names no interpreter with trl")
    if subprocess.run([TRL, "-Ic", "import trl"], capture_output=True, check=False).returncode:
        pytest.skip(f"{TRL} cannot import trl")
    folder = tmp_path_factory.mktemp("trl")
    here = Path(__file__).parent
    path = os.pathsep.join([str(REPOSITORY), str(here / "stand_ins")])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [TRL, str(here / "trl_training.py"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "found.json").read_text())


# --- the same as the own loop ----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", LESSONS)
def test_its_curve_and_its_adapter_are_those_of_the_own_loop(found: dict, name: str) -> None:
    """Sums are taken in another order and by other kernels (5e-7 of a loss was seen); Adam, which
    divides by the size of gradients, makes of the rounding of small ones up to 5e-6 of a weight."""
    own, trl = found["lessons"][name]["own"], found["lessons"][name]["trl"]
    assert len(own["curve"]) == STEPS
    assert trl["rollbacks"] == own["rollbacks"]
    for ours, theirs in zip(own["curve"], trl["curve"], strict=True):
        assert theirs == pytest.approx(ours, rel=1e-5, abs=1e-6)
    assert trl["weights"] == pytest.approx(own["weights"], abs=5e-5)


@pytest.mark.slow
def test_the_lessons_differ_in_what_they_are_named_after(found: dict) -> None:
    lessons = found["lessons"]
    assert lessons["taken back"]["trl"]["rollbacks"]
    assert all(step["general"] == 0 for step in lessons["without general text"]["trl"]["curve"])
    assert all(step["general"] > 0 for step in lessons["in parts"]["trl"]["curve"])


@pytest.mark.slow
def test_the_model_is_left_as_it_was(found: dict) -> None:
    assert all(lesson["trl"]["forwards"] == [] for lesson in found["lessons"].values())


@pytest.mark.slow
def test_stopped_and_killed_it_gives_the_same_bytes(found: dict) -> None:
    said = found["interrupted"]["said"]
    assert said[0].startswith("Stopped stopped at step 1 of 4")
    assert said[1] == "Killed"
    assert said[2].startswith("Stopped stopped at step 3 of 4")
    assert found["interrupted"]["same"]


@pytest.mark.slow
def test_adapters_that_learn_nothing_are_refused(found: dict) -> None:
    assert "adapted layers get no gradient" in found["dead"]


@pytest.mark.slow
def test_a_step_that_is_not_finite_is_counted_and_changes_nothing(found: dict) -> None:
    loss, gradient = found["passed over"]
    assert loss == {"reason": "the loss is nan", "step": 1, "same": True}
    assert gradient["reason"].startswith("the gradient is")
    assert (gradient["step"], gradient["same"]) == (2, True)


# --- unsloth ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_unsloth_trains_in_a_process_of_its_own_and_what_follows_knows_nothing_of_it(
    found: dict,
) -> None:
    """A stand-in, which opens the model with PEFT: so the figures are TRL's."""
    assert found["unsloth"]["said"].startswith("stopped at step 1 of 4")
    assert found["unsloth"]["unsloth"] == pytest.approx(found["unsloth"]["trl"], rel=1e-5)


@pytest.mark.gpu
def test_the_real_unsloth_teaches_a_student(tmp_path: Path) -> None:
    if missing := what_is_missing("unsloth"):
        pytest.skip(f"unsloth cannot be used here: {'; '.join(missing)}")
    dag = make_skill_dag(tmp_path)
    dag.set("sft", trainer="unsloth", learning_rate=3e-2, steps=8, forgetting=10.0)
    metrics = dag.run("sft")
    assert metrics["tools.heldout_loss"] < metrics["tools.heldout_loss_before"]


# --- what is refused before anything runs ----------------------------------------------------


def params(**changes: Any) -> Params:
    capabilities = (Capability("tools", (CALLED,), None, (), 0, None),)
    return Params(**{**PARAMS["sft"], "capabilities": capabilities, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainer": "axolotl"}, "must be one of own, trl, unsloth"),
        ({"trainer": "trl", "packing": True}, "'packing' is true, .*'trainer' to own"),
        (
            {"trainer": "trl", "capabilities": (Capability("a", ("b",), None, (), 0, EXPERTS),)},
            "'experts' of a .*trainer 'trl' does not",
        ),
        ({"trainer": "unsloth", "variant": "pissa"}, "pissa, which changes the weights"),
    ],
)
def test_what_only_the_own_loop_can_do_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        params(**changes)


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ("trl", "'trl' needs TRL, .*pip install .*trl"),
        ("unsloth", "sft.trainer 'unsloth' needs unsloth; .*pip install unsl"),
    ],
)
def test_without_its_package_a_trainer_is_refused_saying_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, trainer: str, message: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=message):
        check_trainer(params(trainer=trainer))
    check_trainer(params())


def test_the_stage_refuses_it_before_the_student_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dag = make_skill_dag(tmp_path)
    (dag.root / "artifacts/distill/student.json").unlink()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    dag.set("sft", trainer="trl")
    with pytest.raises(ValueError, match="needs TRL"):
        dag.run("sft")
