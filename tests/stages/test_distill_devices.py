"""Distil on a device: a GPU learns what the CPU learns, and less memory changes no bit."""

from pathlib import Path

import pytest
import torch

from modeling.backends import be_deterministic
from stages.distill.objective import Weights
from stages.distill.search import Search, search_blocks
from stages.distill.student import build_student, close_gaps, find_gaps
from stages.distill.training import Lesson, train
from stages.formats.targets import TeacherTargets
from stages.process import Stopped
from tests.stages.lessons import PREFIX, rows, subspaces_of, teacher, write_targets
from tests.stages.project import make_project
from tests.stages.test_distill import params, same, weights_of
from tests.stages.tiny_dag import HARMS, StopAt

ROWS = rows(8)
FULL = Weights(1.0, 0.2, 0.5, 1.0)
CPU, GPU = torch.device("cpu"), torch.device("cuda")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
gpu = pytest.param(GPU, marks=[needs_gpu, pytest.mark.gpu])
every_device = pytest.mark.parametrize("device", [CPU, gpu], ids=["cpu", "cuda"])


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> TeacherTargets:
    return write_targets(tmp_path_factory.mktemp("targets"), teacher(), ROWS)


def learn(targets: TeacherTargets, job, device: torch.device, **how) -> dict[str, torch.Tensor]:
    """Train a student on a device; give its weights, on the CPU."""
    be_deterministic(device)
    lesson = Lesson(
        targets, subspaces_of(teacher(), ROWS), PREFIX, [4], [*HARMS],
        params(**{"steps": 6, "batch_rows": 2, **how}),
    )  # fmt: skip
    student = build_student(teacher().float(), [4]).to(device)
    train(student, lesson, FULL, job, "student")
    assert all(tensor.device.type == device.type for tensor in student.state_dict().values())
    return weights_of(student.cpu())


@pytest.mark.parametrize("recompute", [False, True])
@every_device
def test_a_device_learns_what_the_cpu_learns(
    targets: TeacherTargets, tmp_path: Path, device: torch.device, recompute: bool
) -> None:
    found, expected = (make_project(tmp_path / name) for name in ("found", "expected"))
    how = {"gradient_checkpointing": recompute}
    one = learn(targets, found.job(), device, **how)
    other = learn(targets, expected.job(), CPU, **how)
    for line, wanted in zip(found.curve(), expected.curve(), strict=True):
        assert line.pop("phase") == wanted.pop("phase")
        assert line == pytest.approx(wanted, rel=1e-3, abs=1e-4)
    for name, tensor in other.items():
        torch.testing.assert_close(one[name], tensor, rtol=1e-2, atol=1e-3)


@every_device
def test_training_that_was_stopped_goes_on_to_the_same_bits(
    targets: TeacherTargets, tmp_path: Path, device: torch.device
) -> None:
    calm, stopped = (make_project(tmp_path / name) for name in ("calm", "stopped"))
    expected = learn(targets, calm.job(), device)
    stop = StopAt("student", 3)
    job = stopped.job(stop=stop)
    stop.watch(job)
    with pytest.raises(Stopped):
        learn(targets, job, device)
    assert same(learn(targets, stopped.job(), device), expected)


@every_device
def test_a_student_is_constructed_on_a_device(device: torch.device) -> None:
    whole, tokens = teacher().float().to(device), ROWS.to(device)
    search = Search([*HARMS[:6]], 2, PREFIX)
    for _ in search_blocks(whole, [tokens[:2]], search, 3):
        pass
    dropped = sorted(search.dropped)
    student = build_student(whole, dropped)
    explained = list(close_gaps(whole, student, find_gaps(dropped), tokens, 0.1, 4))
    assert len(explained) == len(find_gaps(dropped)) and all(share > 0 for share in explained)
    assert all(parameter.device.type == device.type for parameter in student.parameters())


def test_recomputing_blocks_gives_the_same_student_to_the_bit(
    targets: TeacherTargets, tmp_path: Path
) -> None:
    found = [
        learn(targets, make_project(tmp_path / str(on)).job(), CPU, gradient_checkpointing=on)
        for on in (False, True)
    ]
    assert same(*found)
