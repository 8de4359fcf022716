"""Several teachers: one alone is as ever, none spoils another's, and a stop changes no bit."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from modeling import protection
from modeling.blocks import dissect
from stages.digests import write_manifest
from stages.distill.objective import Weights
from stages.distill.several import (
    Course,
    bare_objective,
    held_out,
    protect,
    same_rows,
    teach,
)
from stages.distill.stage import Params
from stages.distill.student import build_student
from stages.distill.training import Lesson, train
from stages.formats.targets import TeacherTargets
from stages.process import Stopped
from tests.stages.lessons import PREFIX, block_outputs, rows, subspaces_of, teacher, write_targets
from tests.stages.project import Project, make_project
from tests.stages.tiny_dag import HARMS, PARAMS, TEACHER, StopAt, TinyDag, make_tiny_dag
from tests.tiny import tiny_llama

ROWS, GUEST = rows(12), "smollm2-1-7b"
FULL = Weights(1.0, 0.2, 0.5, 1.0)


def other_teacher():
    """One of another depth, width and weights, with the same vocabulary."""
    model = tiny_llama(blocks=7, width=48, seed=5)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


def params(**changed) -> Params:
    section = {**PARAMS["distill"], "teacher_order": (), "teacher_weights": ()}
    return Params(**{**section, "learning_rate": 3e-3, **changed})


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TeacherTargets]:
    folder = tmp_path_factory.mktemp("targets")
    return {
        TEACHER: write_targets(folder / "own", teacher(), ROWS),
        GUEST: write_targets(folder / "guest", other_teacher(), ROWS),
        "elsewhere": write_targets(folder / "elsewhere", other_teacher(), rows(12, start=40)),
    }


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return make_project(tmp_path / "project")


def lesson(targets: TeacherTargets, **changed) -> Lesson:
    held_back = changed["retention_rows"] if "retention_rows" in changed else 2
    subspaces = subspaces_of(teacher(), ROWS)
    return Lesson(targets, subspaces, PREFIX, [4], [*HARMS], params(**changed), held_back)


def course(opened: dict[str, TeacherTargets], *names: str, **changed) -> Course:
    chosen = {name: opened[name] for name in names}
    return Course.of(lesson(chosen[TEACHER], **changed), chosen)


def on_rows_taught(student, several: Course) -> list[float]:
    """KL from each teacher on all rows; what random teachers say of others cannot be learnt."""
    (first, *_), opened = several.lessons, {n: one.targets for n, one in several.lessons.items()}
    return held_out(student, Course.of(replace(several.lessons[first], held_back=12), opened))


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


# --- lessons ---------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["mixed", "sequence"])
@pytest.mark.parametrize("shielded", [False, True])
def test_one_teacher_is_taught_as_ever_to_the_bit(
    opened: dict, tmp_path: Path, schedule: str, shielded: bool
) -> None:
    taught = lesson(opened[TEACHER], schedule=schedule, protect=shielded, retention_rows=1)
    taught = replace(taught, held_back=0)
    students = []
    for number in range(2):
        student, job = build_student(teacher(), [4]), make_project(tmp_path / str(number)).job()
        if number:
            found, _ = teach(student, Course.of(taught, {TEACHER: opened[TEACHER]}), FULL, job)
            assert found is None
        else:
            train(student, taught, FULL, job, "student")
        students.append(weights_of(student))
    assert same(*students)


def test_rows_held_back_and_rows_for_validation_are_never_taught(opened: dict) -> None:
    kept_out = {tuple(row) for row in [*ROWS[:2].tolist(), *ROWS[-2:].tolist()]}
    several = course(opened, TEACHER, GUEST, steps=40)
    for found in (*several.lessons.values(), several.mixed):
        seen = {tuple(row) for batch in found.batches(0) for row in batch.tokens.tolist()}
        assert len(seen) == 8 and not seen & kept_out


def test_a_guest_brings_neither_prefix_nor_anchors_and_its_own_answers(opened: dict) -> None:
    several = course(opened, TEACHER, GUEST)
    own, guest = (next(one.batches(0)) for one in several.lessons.values())
    assert torch.equal(own.tokens, guest.tokens)
    assert own.prefix is not None and own.anchors
    assert guest.prefix is None and guest.anchors == {}
    assert not torch.equal(own.targets.log_probs, guest.targets.log_probs)


def test_the_student_computes_its_own_prefix_where_none_is_stored(opened: dict) -> None:
    """A guest's stored prefix is another model's; the student's own is its first blocks'."""
    student = build_student(teacher(), [4])
    several = course(opened, TEACHER, GUEST)
    calls = block_outputs(student, ROWS[-2:])
    batch = replace(opened[GUEST].rows(torch.tensor([10, 11])), prefix=None)
    with torch.no_grad():
        hidden, _ = bare_objective(student, several.lessons[GUEST])._forward(batch)
    assert torch.equal(hidden, calls[-1])


def test_mixed_answers_on_the_same_rows_are_the_weighted_mixture(opened: dict) -> None:
    several = course(opened, TEACHER, GUEST, teacher_weights=(1.0, 1e-6))
    assert several.mixed.same_rows
    mixed, own = next(several.mixed.batches(0)), next(several.lessons[TEACHER].batches(0))
    assert torch.equal(mixed.prefix, own.prefix)
    torch.testing.assert_close(mixed.targets.log_probs, own.targets.log_probs, atol=1e-3, rtol=0)
    even = next(course(opened, TEACHER, GUEST).mixed.batches(0))
    assert (even.targets.log_probs - own.targets.log_probs).abs().max() > 0.1


def test_other_rows_are_drawn_by_weight_and_a_late_start_draws_the_same(opened: dict) -> None:
    several = course(opened, TEACHER, "elsewhere", steps=60, teacher_weights=(3.0, 1.0))
    assert not several.mixed.same_rows
    assert not same_rows(opened[TEACHER], opened["elsewhere"])
    all_of_it = list(several.mixed.batches(0))
    own = [batch.prefix is not None for batch in all_of_it]
    assert 35 <= sum(own) <= 55
    assert [bool(batch.anchors) for batch in all_of_it] == own
    for start in (1, 17, 59):
        late = list(several.mixed.batches(start))
        assert len(late) == 60 - start
        for one, two in zip(late, all_of_it[start:], strict=True):
            assert torch.equal(one.tokens, two.tokens)


# --- teaching --------------------------------------------------------------------------------


def test_a_protected_sequence_moves_nothing_in_what_the_first_teacher_uses(
    opened: dict, project: Project
) -> None:
    several = course(opened, TEACHER, GUEST, schedule="sequence", steps=5)
    student = build_student(teacher(), [4]).float()
    own, guest = several.lessons.values()
    train(student, own, FULL, project.job(), "first")
    bases = protect(student, own, TEACHER, {})
    before = weights_of(student)
    assert all(name.split(".")[1] in ("2", "3", "4") for name in bases) and len(bases) == 21
    train(student, guest, replace(FULL, anchor=0.0), project.job(), "second", bases)
    changed = {n for n, t in student.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == {f"model.layers.{n.removeprefix('blocks.')}.weight" for n in bases}
    for name, layer in protection.linear_layers(dissect(student).blocks, "blocks").items():
        if name in bases:
            step = layer.weight - before[f"model.layers.{name.removeprefix('blocks.')}.weight"]
            torch.testing.assert_close(
                protection.project(step, bases[name]), step, atol=1e-6, rtol=0
            )


def test_protection_keeps_more_of_the_first_skill_than_none(opened: dict, tmp_path: Path) -> None:
    losses = {}
    for shielded in (False, True):
        several = course(
            opened, TEACHER, GUEST, schedule="sequence", steps=60, protect=shielded,
            protect_share=0.95, protect_rows=10,
        )  # fmt: skip
        project = make_project(tmp_path / str(shielded))
        student = build_student(teacher(), [4])
        before = on_rows_taught(student, several)
        found, _ = teach(student, several, FULL, project.job())
        assert (found.skills, found.after) == ((TEACHER, GUEST), ("none", TEACHER, GUEST))
        losses[shielded] = on_rows_taught(student, several)
        assert losses[shielded][1] < before[1]  # the second one is learnt either way
    assert losses[True][0] < 0.7 * losses[False][0]


@pytest.mark.parametrize("names", [(TEACHER, GUEST), (TEACHER, "elsewhere")])
def test_a_mixture_brings_the_student_nearer_to_both(
    opened: dict, project: Project, names: tuple[str, str]
) -> None:
    several = course(opened, *names, steps=60)
    student = build_student(teacher(), [4])
    before = on_rows_taught(student, several)
    found, _ = teach(student, several, FULL, project.job())
    assert found.after == ("none", "all")
    assert [row[1] for row in found.losses] == held_out(student, several)
    after = on_rows_taught(student, several)
    assert sum(after) < sum(before) and after[1] < before[1]


OPTIONS = [("mixed", True), ("sequence", False), ("sequence", True)]


@pytest.mark.parametrize(("schedule", "shielded"), OPTIONS)
def test_a_course_that_was_stopped_ends_with_the_same_bits(
    opened: dict, tmp_path: Path, schedule: str, shielded: bool
) -> None:
    several = course(opened, TEACHER, GUEST, schedule=schedule, protect=shielded, steps=4)
    calm, stopped = make_project(tmp_path / "calm"), make_project(tmp_path / "stopped")
    whole = build_student(teacher(), [4])
    expected = teach(whole, several, FULL, calm.job())
    last = "student" if schedule == "mixed" else f"student-{GUEST}"
    for step in (2, 4):
        stop = StopAt(last, step)
        job = stopped.job(stop=stop)
        stop.watch(job)
        with pytest.raises(Stopped, match=f"step {step} of 4"):
            teach(build_student(teacher(), [4]), several, FULL, job)
    student = build_student(teacher(), [4])
    assert teach(student, several, FULL, stopped.job()) == expected
    assert same(weights_of(student), weights_of(whole))
    assert stopped.curve() == calm.curve()


# --- the stage -------------------------------------------------------------------------------


@pytest.fixture
def dag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyDag:
    """The DAG up to distill, with targets of two teachers."""
    dag = make_tiny_dag(tmp_path / "dag", monkeypatch)
    dag.run("extract")
    own = dag.root / "artifacts/extract" / TEACHER
    tokens = TeacherTargets(own).rows(torch.arange(10)).tokens
    guest = own.with_name(GUEST)
    write_targets(guest, other_teacher(), tokens)
    write_manifest(guest)
    dag.set("distill", teacher_order=[TEACHER, GUEST])
    return dag


@pytest.mark.parametrize(("schedule", "shielded"), OPTIONS)
def test_the_stage_publishes_the_retention_matrix_and_the_same_bytes_after_a_stop(
    dag: TinyDag, schedule: str, shielded: bool
) -> None:
    dag.set("distill", schedule=schedule, protect=shielded)
    metrics = dag.run("distill")
    published = dag.published("distill")
    assert (
        published["retention.png"][:4] == b"\x89PNG"
        and GUEST.encode() in published["retention.txt"]
    )
    facts = json.loads(published["student.json"])
    assert (facts["teacher"], facts["teachers"]) == (TEACHER, [TEACHER, GUEST])
    after = "all" if schedule == "mixed" else GUEST
    for name in (TEACHER, GUEST):
        assert metrics[f"retention.{name}.after.{after}"] > 0
        assert 0 < metrics[f"retention.{name}.kept"] <= 1
    assert metrics["tokens_trained"] == (6 if schedule == "mixed" else 12) * 3 * 16
    for folder in ("scratch", "artifacts"):
        shutil.rmtree(dag.root / folder / "distill")
    phase = "student" if schedule == "mixed" else f"student-{GUEST}"
    with pytest.raises(Stopped):
        dag.run("distill", StopAt(phase, 3))
    dag.run("distill")
    assert dag.published("distill") == published
