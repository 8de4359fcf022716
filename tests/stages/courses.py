"""Courses of several teachers, at a size for tests: the student's own and two others."""

from dataclasses import replace
from pathlib import Path

from stages.distill.objective import Weights
from stages.distill.params import Params
from stages.distill.several import Course, held_out
from stages.distill.training import Lesson
from stages.formats.targets import TeacherTargets
from tests.stages.lessons import (
    PREFIX,
    rows,
    subspaces_of,
    teacher,
    write_targets,
)
from tests.stages.tiny_dag import HARMS, PARAMS, TEACHER
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


def open_all(folder: Path) -> dict[str, TeacherTargets]:
    """Targets of three teachers; the last one's are of other rows."""
    return {
        TEACHER: write_targets(folder / "own", teacher(), ROWS),
        GUEST: write_targets(folder / "guest", other_teacher(), ROWS),
        "elsewhere": write_targets(folder / "elsewhere", other_teacher(), rows(12, start=40)),
    }


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
