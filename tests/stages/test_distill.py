"""Distil: the student learns, what is shared stays as it was, and a stop changes no bit."""

import copy
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modeling.blocks import dissect
from modeling.loading import open_model
from stages.distill.objective import Loss, Objective, Weights
from stages.distill.params import Params
from stages.distill.stage import order_teachers
from stages.distill.student import build_student, close_gaps, find_gaps
from stages.distill.training import Lesson, train
from stages.formats.importance import read_subspaces
from stages.formats.targets import Batch, TeacherTargets
from stages.formats.tokens import read_all_rows
from stages.learning.recovery import RunAway
from stages.process import Stopped
from tests.stages.lessons import (
    PREFIX,
    rows,
    same,
    subspaces_of,
    teacher,
    weights_of,
    write_targets,
)
from tests.stages.project import Project, make_project
from tests.stages.tiny_dag import HARMS, PARAMS, TEACHER, StopAt, TinyDag, make_tiny_dag

ROWS = rows(8)
DROPPED = [4]
FULL = Weights(1.0, 0.2, 0.5, 1.0)


def params(**changed) -> Params:
    return Params(**{**PARAMS["distill"], "learning_rate": 3e-3, **changed})


def lesson(targets: TeacherTargets, **changed) -> Lesson:
    subspaces = subspaces_of(teacher(), ROWS)
    return Lesson(targets, subspaces, PREFIX, DROPPED, [*HARMS], params(**changed))


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> TeacherTargets:
    return write_targets(tmp_path_factory.mktemp("targets"), teacher(), ROWS)


# --- training --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kl", "ce", "anchor"])
def test_sixty_steps_bring_down_the_term_that_is_asked_for(
    targets: TeacherTargets, project: Project, name: str
) -> None:
    terms = {"kl": (1.0, 0.0, 0.0), "ce": (0.0, 1.0, 0.0), "anchor": (0.01, 0.0, 1.0)}
    student = build_student(teacher(), DROPPED)
    taught = lesson(targets, steps=60, batch_rows=4)
    train(student, taught, Weights(*terms[name], 1.0), project.job(), "student")
    curve = project.curve()
    assert [line["step"] for line in curve] == list(range(1, 61))
    first, last = (sum(line[name] for line in part) for part in (curve[:5], curve[-5:]))
    assert last < 0.5 * first


def test_sixty_steps_bring_down_the_whole_loss(targets: TeacherTargets, project: Project) -> None:
    student = build_student(teacher(), DROPPED)
    train(student, lesson(targets, steps=60, batch_rows=4), FULL, project.job(), "student")
    losses = [line["kl"] + 0.2 * line["ce"] + 0.5 * line["anchor"] for line in project.curve()]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


@pytest.mark.parametrize("weights", [FULL, Weights(0.0, 1.0, 0.0, 1.0)], ids=["full", "text"])
def test_what_is_shared_with_the_teacher_stays_to_the_bit(
    targets: TeacherTargets, project: Project, weights: Weights
) -> None:
    student = build_student(teacher(), DROPPED)
    before = weights_of(student)
    train(student, lesson(targets, steps=5), weights, project.job(), "student")
    changed = {name for name, t in student.state_dict().items() if not torch.equal(t, before[name])}
    prefix = tuple(f"model.layers.{n}." for n in range(PREFIX))
    assert not [name for name in changed if name.startswith(prefix)]
    assert not changed & {"model.embed_tokens.weight", "lm_head.weight"}
    for number in range(PREFIX, 5):  # and every block behind it did learn
        assert f"model.layers.{number}.mlp.down_proj.weight" in changed
    assert not any(parameter.requires_grad for parameter in dissect(student).blocks.parameters())


def test_the_seed_decides_what_is_learnt(targets: TeacherTargets, tmp_path: Path) -> None:
    results = []
    for number, (seed, noise) in enumerate([(0, 1), (0, 2), (1, 1)]):
        student = build_student(teacher(), DROPPED)
        torch.manual_seed(noise)
        job = make_project(tmp_path / str(number)).job()
        train(student, lesson(targets, steps=4, seed=seed), FULL, job, "student")
        results.append(weights_of(student))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


@pytest.mark.parametrize("step", [1, 3, 6, 7])
def test_a_run_that_was_stopped_ends_with_the_same_weights_and_moments(
    targets: TeacherTargets, tmp_path: Path, step: int
) -> None:
    taught = lesson(targets, steps=7)
    calm, stopped = make_project(tmp_path / "calm"), make_project(tmp_path / "stopped")
    whole = build_student(teacher(), DROPPED)
    train(whole, taught, FULL, calm.job(), "student")

    student, stop = build_student(teacher(), DROPPED), StopAt("student", step)
    job = stopped.job(stop=stop)
    stop.watch(job)
    with pytest.raises(Stopped, match=f"step {step} of 7"):
        train(student, taught, FULL, job, "student")
    student = build_student(teacher(), DROPPED)
    train(student, taught, FULL, stopped.job(), "student")

    assert same(weights_of(student), weights_of(whole))
    assert stopped.curve() == calm.curve()
    last = "checkpoints/student/step-00000007/train.safetensors"
    one, other = (load_file(found.work()[-1] / last) for found in (calm, stopped))
    assert same(one, other)
    parts = {"step", "scale", "master", "exp_avg", "exp_avg_sq"}
    assert {name.split(".")[0] for name in one} == parts
    assert any(name.startswith("exp_avg_sq.maps.") for name in one)  # the anchors' maps as well


def test_a_student_that_is_not_finite_is_refused_before_any_step(
    targets: TeacherTargets, project: Project
) -> None:
    student = build_student(teacher(), DROPPED)
    dissect(student).blocks[3].mlp.up_proj.weight.data[0, 0] = torch.inf
    before = weights_of(student)
    with pytest.raises(RunAway, match="before any training.*not finite"):
        train(student, lesson(targets), FULL, project.job(), "student")
    assert same(weights_of(student), before)
    assert project.curve() == []


# --- parameters ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kd_weight": 0.0, "ce_weight": 0.0}, "'kd_weight' and 'ce_weight' are both 0"),
        (
            {"student": "mamba-7m", "schedule": "sequence"},
            "'protect_share' is 0.95, but 'mamba-7m'",
        ),
        ({"student": "pruned-2"}, "unknown student 'pruned-2'.*pruned-27"),
        ({"temperature": 0.0}, "'temperature' is 0.0"),
        ({"learning_rate": -1e-4}, "'learning_rate' is -0.0001"),
        ({"warmup": 0.9}, "'warmup' is 0.9"),
        ({"anchor_weight": -1.0}, "'anchor_weight' is -1.0"),
        ({"steps": 0}, "'steps' is 0"),
        ({"learning_rate": float("nan")}, "'learning_rate' is nan"),
        ({"kd_weight": float("nan")}, "'kd_weight' is nan"),
        ({"schedule": "random"}, "'schedule' is 'random'"),
        ({"protect_share": 1.5}, "'protect_share' is 1.5"),
        ({"replay_share": -0.5}, "'replay_share' is -0.5"),
        ({"protect_rows": 0}, "'protect_rows' is 0"),
        ({"retention_rows": 0}, "'retention_rows' is 0"),
        ({"teacher_weights": (1.0, -1.0)}, "'teacher_weights' is -1.0"),
    ],
)
def test_contradictions_are_refused(changed: dict, message: str) -> None:
    params()
    with pytest.raises(ValueError, match=message):
        params(**changed)


def test_teachers_teach_in_the_order_asked_for_and_no_other_is_taken() -> None:
    assert order_teachers(params(), ["ada", "ben"]) == ["ada", "ben"]
    assert order_teachers(params(teacher_order=("ben", "ada")), ["ada", "ben"]) == ["ben", "ada"]
    with pytest.raises(ValueError, match="'teacher_order' is ben, but.*targets of ada, ben"):
        order_teachers(params(teacher_order=("ben",)), ["ada", "ben"])
    with pytest.raises(ValueError, match="1 weights for 2 teachers .ada, ben."):
        order_teachers(params(teacher_weights=(1.0,)), ["ada", "ben"])


# --- the stage -------------------------------------------------------------------------------


@pytest.fixture
def dag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyDag:
    """The DAG up to distill."""
    dag = make_tiny_dag(tmp_path / "dag", monkeypatch)
    dag.run("extract")
    return dag


def test_the_stage_publishes_a_student_and_its_controls(dag: TinyDag) -> None:
    metrics = dag.run("distill")
    folder = dag.root / "artifacts/distill"
    facts = json.loads((folder / "student.json").read_text(encoding="utf-8"))
    assert (facts["teacher"], facts["dropped"]) == (TEACHER, [5, 6, 7])
    names = ("student", "before_training", "text_only")
    models = {name: open_model(folder / name) for name in names}
    whole = open_model(dag.teacher_folder)

    opened = build_student(whole, [5, 6, 7])
    calibration = torch.from_numpy(read_all_rows(dag.root / "artifacts/prepare", "calibration", 0))
    explained = list(close_gaps(whole, opened, find_gaps([5, 6, 7]), calibration, 0.1, 8))
    assert facts["gap_explained"] == pytest.approx(explained)
    before = copy.deepcopy(models["before_training"]).bfloat16()
    assert same(weights_of(before), weights_of(opened.bfloat16()))

    assert not same(weights_of(models["student"]), weights_of(models["text_only"]))
    for model in models.values():
        assert len(dissect(model).blocks) == metrics["blocks"] == 5
        for number in range(3):  # the prefix is the teacher's own
            assert same(
                weights_of(dissect(model).blocks[number]), weights_of(dissect(whole).blocks[number])
            )
    assert metrics["parameters"] == sum(p.numel() for p in models["student"].parameters())
    assert metrics["tokens_trained"] == 6 * 3 * 16


def test_each_model_starts_from_the_untrained_student_and_learns_what_it_is_said_to(
    dag: TinyDag, project: Project
) -> None:
    dag.run("distill")
    folder = dag.root / "artifacts/distill"
    profile = dag.root / "artifacts/profile" / TEACHER
    found = TeacherTargets(dag.root / "artifacts/extract" / TEACHER)
    taught = Lesson(found, read_subspaces(profile), 3, [5, 6, 7], [*HARMS], params(steps=6))
    for name, weights in (("student", FULL), ("text_only", Weights(0.0, 1.0, 0.0, 1.0))):
        model = copy.deepcopy(open_model(folder / "before_training"))  # aligned in memory
        train(model, taught, weights, project.job(), name)
        assert same(
            weights_of(model.bfloat16()), weights_of(open_model(folder / name).bfloat16())
        ), name


@pytest.mark.parametrize("at", [("student", 2), ("student", 6), ("text_only", 4), ("text_only", 6)])
def test_an_interrupted_stage_publishes_the_same_bytes(dag: TinyDag, at: tuple[str, int]) -> None:
    dag.run("distill")
    expected = dag.published("distill")
    shutil.rmtree(dag.root / "scratch/distill")
    shutil.rmtree(dag.root / "artifacts/distill")
    with pytest.raises(Stopped, match=f"step {at[1]} of 6"):
        dag.run("distill", StopAt(*at))
    assert dag.published("distill") == {}
    dag.run("distill")
    assert dag.published("distill") == expected


def test_having_no_anchors_is_no_obstacle(dag: TinyDag) -> None:
    dag.set("extract", anchors=0)
    dag.run("extract")
    dag.run("distill")
    curve = (path for path in (dag.root / "scratch/distill").glob("*/metrics.jsonl"))
    lines = [json.loads(line) for line in next(curve).read_text(encoding="utf-8").splitlines()]
    taught = [line["anchor"] for line in lines if line["phase"] in ("student", "text_only")]
    assert taught == [0.0] * 12


# --- recovery --------------------------------------------------------------------------------


def test_a_batch_that_runs_away_is_passed_over_and_the_reason_is_published(
    targets: TeacherTargets, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = build_student(teacher(), DROPPED)
    calls = 0
    whole = Objective.__call__

    def poisoned(self: Objective, batch: Batch) -> Loss:
        nonlocal calls
        loss = whole(self, batch)
        calls += 1
        return replace(loss, total=loss.total * math.nan) if calls == 9 else loss

    monkeypatch.setattr(Objective, "__call__", poisoned)
    job = project.job()
    (back,) = train(student, lesson(targets, steps=12, validate_every=4), FULL, job, "student")
    assert "nan" in back.reason and back.to_step in (0, 4) and back.step > back.to_step
    assert all(torch.isfinite(tensor).all() for tensor in student.state_dict().values())
    lines = (job.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 12  # no step is repeated
    assert [json.loads(line)["rollbacks"] for line in lines if "rollbacks" in line] == [1]
