"""Controls: students that learn without a part of the loss, and are the same in all else."""

from pathlib import Path

import pytest

from modeling.loading import open_model
from stages.distill.params import Params
from tests.stages.lessons import same, weights_of
from tests.stages.tiny_dag import PARAMS, TinyDag, make_tiny_dag


def params(**changed) -> Params:
    return Params(**{**PARAMS["distill"], **changed})


@pytest.fixture
def dag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyDag:
    """The DAG up to distill."""
    dag = make_tiny_dag(tmp_path / "dag", monkeypatch)
    dag.run("extract")
    return dag


def test_without_controls_there_are_none(dag: TinyDag) -> None:
    dag.set("distill", controls=[])
    dag.run("distill")
    folders = {path.parent.name for path in (dag.root / "artifacts/distill").glob("*/config.json")}
    assert folders == {"student", "before_training"}


def test_a_control_is_the_student_trained_without_a_part_of_the_loss(dag: TinyDag) -> None:
    dag.set("distill", controls=["without_anchors", "without_text", "without_answers"])
    dag.run("distill")
    folder = dag.root / "artifacts/distill"
    left = {"without_anchors": "anchor_weight", "without_text": "ce_weight"}
    weights = {name: PARAMS["distill"][name] for name in left.values()}
    controls = {name: weights_of(open_model(folder / name)) for name in left}
    student = weights_of(open_model(folder / "student"))
    assert (folder / "without_answers/config.json").is_file()
    for name, weight in left.items():
        assert not same(controls[name], student)
        dag.set("distill", controls=[], **{**weights, weight: 0.0})
        dag.run("distill")
        assert same(weights_of(open_model(folder / "student")), controls[name]), name


@pytest.mark.parametrize(
    ("controls", "weights", "message"),
    [
        (("text",), {}, "text_only, without_anchors"),
        (("without_text",), {"ce_weight": 0.0}, "without_text.*as the student is; leave it out"),
        (("without_anchors",), {"anchor_weight": 0.0}, "without_anchors.*as the student is"),
        (("without_answers",), {"ce_weight": 0.0}, "neither on answers nor on the text"),
        (("without_text",), {"kd_weight": 0.0}, "neither on answers nor on the text"),
    ],
)
def test_a_control_that_is_none_is_refused(controls: tuple, weights: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        params(controls=controls, **weights)
