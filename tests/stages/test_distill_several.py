"""Several teachers: one alone is as ever, none spoils another's, and a stop changes no bit."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stages.digests import write_manifest
from stages.distill.several import Course, bare_objective, held_out, same_rows, teach
from stages.distill.student import build_student
from stages.distill.training import train
from stages.formats.targets import TeacherTargets
from stages.process import Stopped
from tests.stages.courses import (
    FULL,
    GUEST,
    ROWS,
    course,
    lesson,
    on_rows_taught,
    open_all,
    other_teacher,
)
from tests.stages.lessons import block_outputs, same, teacher, weights_of, write_targets
from tests.stages.project import Project, make_project
from tests.stages.tiny_dag import TEACHER, StopAt, TinyDag, make_tiny_dag


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TeacherTargets]:
    return open_all(tmp_path_factory.mktemp("targets"))


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
    steps = 6 if schedule == "mixed" else 14 if shielded else 12  # with a row in three repeated
    assert metrics["tokens_trained"] == steps * 3 * 16
    for folder in ("scratch", "artifacts"):
        shutil.rmtree(dag.root / folder / "distill")
    phase = "student" if schedule == "mixed" else f"student-{GUEST}"
    with pytest.raises(Stopped):
        dag.run("distill", StopAt(phase, 3))
    dag.run("distill")
    assert dag.published("distill") == published
