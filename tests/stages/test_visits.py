"""Teachers that come to their blocks more than once: steps add up, nothing is left unmeasured."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from modeling.blocks import find_units
from modeling.memory import Plan
from modeling.refusals import CannotFollow
from modeling.teacher import Teacher
from modeling.weights import Resident
from stages.contract import Job
from stages.extract.extraction import Extraction
from stages.extract.harvest import Wanted
from stages.formats.importance import Subspaces
from stages.process import Stopped, StopRequest
from stages.profile.measuring import Measured, Measuring
from stages.profile.stage import Params
from tests.causal_lms import tiny_model
from tests.stages.project import Project, make_project

PARAMS = Params(
    ablation_rows=2, covariance_rows=4, batch_rows=2, subspace_rank=4, control_blocks=2,
    resamples=100, engine="resident", seed=0,
)  # fmt: skip
VISITS = {"llama": 4, "hrm_text": 32}
ROWS = torch.arange(6 * 8).view(6, 8).mul(31).remainder(80).add(8)
NOTHING = Subspaces(torch.zeros(0), torch.zeros(0), torch.zeros(0))


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def teacher_of(family: str) -> Teacher:
    model = tiny_model(family)
    return Teacher(
        model, find_units(model), Resident(model), Plan("resident", 32, ""), torch.device("cpu")
    )


def extract(family: str, job: Job) -> dict[str, bytes]:
    """Three shards of one batch in groups of two; what is left, by file."""
    Extraction(teacher_of(family), ROWS, Wanted(4, 1, (), NOTHING), 2, 2, job).run()
    return {path.name: path.read_bytes() for path in sorted(job.output.iterdir())}


def profile(family: str, job: Job) -> Measured:
    return Measuring(teacher_of(family), ROWS[:4], PARAMS, job).run()


def steps_of(project: Project) -> list[tuple[int, int]]:
    return [(line["step"], line["total"]) for line in project.curve()]


def stopping(project: Project, at: int, patch: pytest.MonkeyPatch) -> Job:
    """A job that is asked to stop when so many steps are done."""
    stop = StopRequest()
    job = project.job(stop=stop)
    add = job.progress.add

    def watched(phase: str, step: int, *rest) -> None:
        add(phase, step, *rest)
        stop.requested = step == at

    patch.setattr(job.progress, "add", watched)
    return job


@pytest.mark.parametrize("family", VISITS)
@pytest.mark.parametrize("run", [extract, profile])
def test_steps_run_to_their_total_without_a_gap(run: Callable, family: str, tmp_path: Path) -> None:
    """extract: 3 shards, 2 groups; profile: 2 batches, 1 of them judged."""
    total = 3 * VISITS[family] + 2 if run is extract else 2 * VISITS[family] + 1
    project = make_project(tmp_path)
    run(family, project.job())
    assert steps_of(project) == [(step, total) for step in range(1, total + 1)]


@pytest.mark.parametrize("family", VISITS)
@pytest.mark.parametrize("at", [1, 7, 9, 13, 14])
def test_an_interrupted_extraction_ends_with_the_same_steps_and_bytes(
    family: str, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm, stormy = make_project(tmp_path / "calm"), make_project(tmp_path / "stormy")
    expected = extract(family, calm.job())
    if at < steps_of(calm)[-1][1]:
        with pytest.raises(Stopped, match=re.escape(f"step {at} of {3 * VISITS[family] + 2}")):
            extract(family, stopping(stormy, at, monkeypatch))
    assert extract(family, stormy.job()) == expected
    assert steps_of(stormy) == steps_of(calm)


@pytest.mark.parametrize("family", VISITS)
def test_every_block_is_judged_however_often_it_is_come_to(family: str, tmp_path: Path) -> None:
    found = profile(family, make_project(tmp_path).job())
    assert found.tensors["harm"].shape[0] == PARAMS.ablation_rows
    assert torch.isfinite(found.tensors["harm"]).all() and (found.tensors["harm"] > 0).any()


@pytest.mark.parametrize("family", ["hy_v4", "deepseek_v4", "xlnet", "reformer"])
@pytest.mark.parametrize("run", [extract, profile])
def test_a_model_that_does_not_fit_is_refused_before_a_step_is_done(
    run: Callable, family: str, tmp_path: Path
) -> None:
    project = make_project(tmp_path)
    with pytest.raises(CannotFollow, match="take another"):
        run(family, project.job())
    assert project.curve() == []
