"""Distil with the fast path and without: the same lesson, to rounding."""

from pathlib import Path

import pytest

from stages.distill.student import build_student
from stages.distill.training import train
from tests.stages.lessons import teacher, write_targets
from tests.stages.project import make_project
from tests.stages.test_distill import DROPPED, FULL, ROWS, lesson


def test_the_fast_path_changes_what_is_learnt_by_rounding_alone(tmp_path: Path) -> None:
    targets = write_targets(tmp_path / "targets", teacher(), ROWS)
    curves = []
    for fast in (True, False):
        student = build_student(teacher(), DROPPED).float()
        project = make_project(tmp_path / str(fast))
        taught = lesson(targets, steps=4, fast_path=fast)
        train(student, taught, FULL, project.job(), "student")
        curves.append([line["kl"] for line in project.curve()])
        assert not [module for module in student.modules() if "forward" in vars(module)]
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)
    assert curves[0] != curves[1]
