"""Several processes: they learn what one learns, never part, and only the first one writes."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stages.contract import Job
from stages.declaration import read_declaration
from stages.distill.objective import Loss, Objective, Weights
from stages.distill.student import build_student
from stages.distill.training import Lesson, train
from stages.formats.targets import TeacherTargets
from stages.process import Stopped, StopRequest
from stages.ranks import ALONE, Ranks, announced, join_ranks
from tests.stages.crew import in_processes
from tests.stages.lessons import PREFIX, rows, same, subspaces_of, teacher, write_targets
from tests.stages.project import make_project
from tests.stages.test_distill import params
from tests.stages.tiny_dag import HARMS, StopAt

ROWS, STEPS = rows(12), 8
FULL = Weights(1.0, 0.2, 0.5, 1.0)
HOW = {"steps": STEPS, "batch_rows": 4, "validate_every": 4, "validation_rows": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Targets in `targets`."""
    folder = tmp_path_factory.mktemp("ranks")
    write_targets(folder / "targets", teacher(), ROWS)
    return folder


def learn(
    ranks: Ranks, folder: Path, project: str, stop_at: int = 0, poison: int = 0, **how
) -> dict[str, Tensor]:
    """Train a student and give its weights; stop_at: asks to stop in the first process alone."""
    torch.manual_seed(ranks.index)  # nothing follows from it
    root = folder / project
    stop = StopAt("student", stop_at) if stop_at and ranks.leads else StopRequest()
    job = Job(root, read_declaration(root, "walk", None), stop, ranks)
    if stop_at and ranks.leads:
        stop.watch(job)
    lesson = Lesson(
        TeacherTargets(folder / "targets"), subspaces_of(teacher(), ROWS), PREFIX, [4], [*HARMS],
        params(**{**HOW, **how}), ranks=ranks,
    )  # fmt: skip
    student = build_student(teacher().float(), [4])
    if poison:
        _poison(poison if ranks.index == ranks.count - 1 else -1)
    train(student, lesson, FULL, job, "student")
    return {name: tensor.clone() for name, tensor in student.state_dict().items()}


def _poison(call: int) -> None:
    """Make the loss of one call of this process NaN; this process ends soon."""
    whole, calls = Objective.__call__, 0

    def poisoned(self: Objective, batch) -> Loss:
        nonlocal calls
        calls += 1
        loss = whole(self, batch)
        return replace(loss, total=loss.total * math.nan) if calls == call else loss

    Objective.__call__ = poisoned


# --- the group -------------------------------------------------------------------------------


def exchange(ranks: Ranks) -> dict:
    own = float(ranks.index + 1)
    tensors = [torch.full((2, 3), own), torch.full((4,), 10 * own)]
    ranks.average(tensors)
    copied = torch.full((5,), own, dtype=torch.bfloat16)
    ranks.copy_from_lead([copied])
    return {
        "average": [tensor.unique().tolist() for tensor in tensors],
        "copied": copied.unique().tolist(),
        "sums": ranks.sums([own, 0.1]),
        "means": ranks.means([own]),
        "any": [ranks.any(ranks.index == 1), ranks.any(False)],
        "of_lead": ranks.of_lead({"index": ranks.index}),
        "share": ranks.share(6),
        "leads": ranks.leads,
    }


def test_processes_exchange_tensors_and_values() -> None:
    first, second = in_processes(2, exchange)
    assert (first.pop("share"), second.pop("share")) == (slice(0, 3), slice(3, 6))
    assert (first.pop("leads"), second.pop("leads")) == (True, False)
    assert first == second
    assert first["average"] == [[1.5], [15.0]]
    assert first["copied"] == [1.0]
    assert first["sums"] == [3.0, 0.2]
    assert first["means"] == [1.5]
    assert first["any"] == [True, False]
    assert first["of_lead"] == {"index": 0}


def test_a_process_alone_is_a_group_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert announced() == (0, 1) and join_ranks() is ALONE
    tensor = torch.ones(3)
    ALONE.average([tensor])
    assert tensor.tolist() == [1, 1, 1]
    assert ALONE.sums([0.1]) == [0.1] and ALONE.of_lead("a") == "a"
    assert ALONE.any(True) and not ALONE.any(False)
    assert ROWS[ALONE.share(len(ROWS))].equal(ROWS)


# --- training --------------------------------------------------------------------------------


def test_two_processes_have_the_losses_and_the_student_of_one(folder: Path) -> None:
    alone, pair = make_project(folder / "alone"), make_project(folder / "pair")
    expected = learn(ALONE, folder, "alone")
    first, second = in_processes(2, learn, folder, "pair")
    assert same(first, second)
    for one, other in zip(alone.curve(), pair.curve(), strict=True):
        assert one.pop("phase") == other.pop("phase") == "student"
        assert one == pytest.approx(other, rel=1e-5)
    assert alone.curve()[3]["validation"] == pytest.approx(pair.curve()[3]["validation"], rel=1e-6)
    for name, tensor in expected.items():
        torch.testing.assert_close(first[name], tensor, rtol=1e-5, atol=1e-6)


def stopped(ranks: Ranks, folder: Path, project: str, step: int) -> str:
    try:
        learn(ranks, folder, project, stop_at=step)
    except Stopped as reason:
        return str(reason)
    return "ran through"


def test_two_processes_that_were_stopped_go_on_to_the_same_bits(folder: Path) -> None:
    calm, project = (make_project(folder / name) for name in ("calm", "stopped"))
    whole, _ = in_processes(2, learn, folder, "calm")
    for reason in in_processes(2, stopped, folder, "stopped", 3):
        assert f"step 3 of {STEPS}" in reason  # the second one was never asked
    first, second = in_processes(2, learn, folder, "stopped")
    assert same(first, whole) and same(second, whole)
    assert project.curve() == calm.curve()


def test_what_runs_away_in_one_process_takes_both_back(folder: Path) -> None:
    project = make_project(folder / "poisoned")
    first, second = in_processes(2, learn, folder, "poisoned", 0, 7)
    assert same(first, second)
    assert all(torch.isfinite(tensor).all() for tensor in first.values())
    lines = project.curve()
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert sum("rollbacks" in line for line in lines) == 1


# --- what is written, and refusals -----------------------------------------------------------


def follow(ranks: Ranks, root: Path) -> str:
    job = Job(root, read_declaration(root, "walk", None), StopRequest(), ranks)
    job.note("gaps", 1, 1, explained=0.5)
    job.say("said once")
    try:
        (job.output / "file").write_text("mine")
    except RuntimeError as error:
        return str(error)
    return "written"


def test_only_the_first_process_writes(tmp_path: Path) -> None:
    project = make_project(tmp_path / "project")
    first, second = in_processes(2, follow, project.root)
    assert first == "written"
    assert "process 1 of 2 of 'walk'" in second and "job.leads" in second
    assert project.steps() == [1]


def test_rows_that_cannot_be_shared_out_are_refused() -> None:
    assert params(batch_rows=6, processes=3).processes == 3
    with pytest.raises(ValueError, match="'batch_rows' is 4, which 'processes', 3, does not"):
        params(batch_rows=4, processes=3)
    with pytest.raises(ValueError, match="'processes' is 0"):
        params(processes=0)
