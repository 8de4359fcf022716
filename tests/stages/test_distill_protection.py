"""A later teacher in a sequence: what it may not move, and what is repeated beside it."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from modeling import protection
from modeling.blocks import dissect
from stages.distill.several import Course, GuestLesson, protect, teach
from stages.distill.student import build_student
from stages.distill.training import train
from stages.formats.targets import Batch, TeacherTargets
from tests.stages.courses import FULL, GUEST, ROWS, course, on_rows_taught, open_all
from tests.stages.lessons import teacher, weights_of
from tests.stages.project import Project, make_project
from tests.stages.tiny_dag import TEACHER


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TeacherTargets]:
    return open_all(tmp_path_factory.mktemp("targets"))


# --- subspaces ------------------------------------------------------------------------------


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


# --- replays ---------------------------------------------------------------------------------


def replays_of(several: Course, name: str, start: int = 0) -> list[torch.Tensor | None]:
    """The rows that are repeated beside each step's batch, of all steps from one on."""
    steps = several.mixed.params.steps - start
    found = itertools.islice(several.lessons[name].replays(start), steps)
    return [None if batch is None else batch.tokens for batch in found]


@pytest.mark.parametrize(("share", "rows_a_step"), [(0.25, 0.5), (0.5, 1), (0.6, 1), (1.5, 3)])
def test_a_share_is_rows_of_earlier_teachers_a_row_of_the_later_one(
    opened: dict, share: float, rows_a_step: float
) -> None:
    several = course(opened, TEACHER, GUEST, replay_share=share, batch_rows=2, steps=12)
    repeated = [tokens for tokens in replays_of(several, GUEST) if tokens is not None]
    assert sum(map(len, repeated)) == 12 * rows_a_step
    assert not any(tokens is not None for tokens in replays_of(several, TEACHER))
    taught = {tuple(row) for row in ROWS[2:-2].tolist()}  # not those that are measured on
    assert {tuple(row) for tokens in repeated for row in tokens.tolist()} <= taught


@pytest.mark.parametrize("changed", [{"protect": False}, {"replay_share": 0.0}])
def test_nothing_is_repeated_without_protection_or_at_a_share_of_none(
    opened: dict, changed: dict
) -> None:
    assert replays_of(course(opened, TEACHER, GUEST, **changed), GUEST) == [None] * 6


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_a_late_start_repeats_what_a_whole_pass_repeats_there(opened: dict, share: float) -> None:
    several = course(
        opened, TEACHER, GUEST, "elsewhere", replay_share=share, batch_rows=2, steps=11
    )
    whole = replays_of(several, "elsewhere")
    for start in range(12):
        for late, once in zip(replays_of(several, "elsewhere", start), whole[start:], strict=True):
            assert (late is None and once is None) or torch.equal(late, once)


def test_earlier_teachers_take_turns_and_answer_their_own_rows(opened: dict) -> None:
    several = course(opened, TEACHER, GUEST, "elsewhere", replay_share=1.0, steps=4)
    first, second, third, _ = itertools.islice(several.lessons["elsewhere"].replays(0), 4)
    own, guest = (next(several.lessons[name].batches(0)) for name in (TEACHER, GUEST))
    assert first.prefix is not None and second.prefix is None
    assert torch.equal(first.targets.log_probs, own.targets.log_probs)
    assert torch.equal(second.targets.log_probs, guest.targets.log_probs)
    assert not torch.equal(third.tokens, first.tokens)


@dataclass(frozen=True)
class OneBatch(GuestLesson):
    """A lesson of one batch alone."""

    batch: Batch | None = None

    def batches(self, start: int) -> Iterator[Batch]:
        yield from [self.batch][start:]


def test_repeated_rows_count_as_much_as_others(opened: dict, tmp_path: Path) -> None:
    """The gradient is that of one batch of all rows, but for the number that it is the mean of."""
    several = course(opened, TEACHER, GUEST, "elsewhere", replay_share=1.0, steps=1)
    taught = replace(several.lessons["elsewhere"], earlier=(several.lessons[GUEST],))
    own, again = next(taught.batches(0)), next(taught.replays(0))
    pairs = zip(vars(own.targets).values(), vars(again.targets).values(), strict=True)
    answers = type(own.targets)(*map(torch.cat, pairs))
    both = replace(own, tokens=torch.cat([own.tokens, again.tokens]), targets=answers)
    norms = []
    for name, one in (
        ("apart", taught),
        ("together", OneBatch(**{**vars(taught), "earlier": ()}, batch=both)),
    ):
        project, student = make_project(tmp_path / name), build_student(teacher(), [4]).float()
        train(student, one, replace(FULL, anchor=0.0), project.job(), "student")
        norms.append(project.curve()[-1]["gradient_norm"])
    assert norms[0] == pytest.approx(2 * norms[1], rel=1e-4)


def test_replays_keep_more_of_the_first_skill_than_none(opened: dict, tmp_path: Path) -> None:
    losses = {}
    for share in (0.0, 0.5):
        several = course(
            opened, TEACHER, "elsewhere", schedule="sequence", steps=60, protect_share=0.0,
            replay_share=share,
        )  # fmt: skip
        student = build_student(teacher(), [4])
        before = on_rows_taught(student, several)
        teach(student, several, FULL, make_project(tmp_path / str(share)).job())
        losses[share] = on_rows_taught(student, several)
        assert losses[share][1] < before[1]  # the second one is learnt either way
    assert losses[0.5][0] < 0.9 * losses[0.0][0]


def test_the_control_gets_as_many_rows_as_the_student(opened: dict) -> None:
    for changed, steps in (
        ({"schedule": "sequence", "replay_share": 0.25}, 18),
        ({"schedule": "sequence", "replay_share": 0.25, "protect": False}, 16),
        ({"schedule": "mixed"}, 8),
    ):
        assert (
            course(opened, TEACHER, GUEST, steps=8, batch_rows=2, **changed).control.params.steps
            == steps
        )
