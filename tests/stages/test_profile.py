"""Profile: each number equals what a naive computation of it gives."""

import copy
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from modeling.blocks import dissect, drop_blocks
from modeling.memory import Plan
from modeling.teacher import Teacher
from modeling.weights import Resident
from stages.process import Stopped, StopRequest
from stages.profile.harm import influence
from stages.profile.measuring import Measured, Measuring, control_blocks
from stages.profile.stage import Params, summarise
from stages.profile.subspace import RunningCovariance, project, random_basis, rank_holding
from tests.stages.project import make_project
from tests.tiny import tiny_gpt2, tiny_llama, tiny_mamba

PARAMS = Params(
    ablation_rows=4, covariance_rows=4, batch_rows=2, subspace_rank=4, control_blocks=2,
    resamples=100, engine="resident", seed=0,
)  # fmt: skip
TOKENS = torch.arange(3 * 50).view(3, 50).mul(31).remainder(97)  # more than one chunk of logits


def naive_kl(model, changed, tokens: Tensor) -> Tensor:
    """KL(model || changed) in nats a token, mean of each row, from whole float64 logits."""
    p, q = (m(tokens).logits.double().log_softmax(-1) for m in (model, changed))
    return (p.exp() * (p - q)).sum(-1).mean(-1)


def measure(model, rows: Tensor, job, **changed) -> Measured:
    """The stage's one passage, without its files."""
    teacher = Teacher(
        model,
        dissect(model).blocks,
        Resident(model),
        Plan("resident", 100, ""),
        torch.device("cpu"),
    )
    return Measuring(teacher, rows, replace(PARAMS, **changed), job).run()


@pytest.fixture
def job(tmp_path):
    return make_project(tmp_path).job()


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


# --- ablation --------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_mamba])
def test_the_harm_of_skipping_is_that_of_a_model_without_the_block(build: Callable, job) -> None:
    model = build()
    found = measure(model, TOKENS, job).tensors["harm"]
    for block in range(3):
        smaller = copy.deepcopy(model)
        drop_blocks(smaller, [block])
        expected = naive_kl(model, smaller, TOKENS)
        assert expected.min() > 0.01  # the blocks of the tiny model do something
        torch.testing.assert_close(found[:, block].double(), expected, atol=1e-5, rtol=1e-4)


def test_projecting_onto_all_directions_does_no_harm(job) -> None:
    found = measure(tiny_llama(), TOKENS, job, subspace_rank=32, control_blocks=3).tensors
    torch.testing.assert_close(found["kept"], torch.zeros(3, 3), atol=1e-5, rtol=0)


def test_the_harm_of_projecting_is_that_of_a_model_whose_block_is_projected(job) -> None:
    model = tiny_llama()
    found = measure(model, TOKENS, job, control_blocks=1).tensors  # the last block
    projected = copy.deepcopy(model)

    def narrowed(_module, _arguments, output):
        return project(output, found["mean"][2], found["basis"][2])

    dissect(projected).blocks[2].register_forward_hook(narrowed)
    expected = naive_kl(model, projected, TOKENS)
    torch.testing.assert_close(found["kept"][:, 2].double(), expected, atol=1e-5, rtol=1e-4)
    assert (found["random"][:, 2] > found["kept"][:, 2]).all()
    assert found["kept"][:, :2].isnan().all()


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_mamba])
def test_the_harm_in_bfloat16_as_teachers_are_opened_is_close_to_that_in_float32(
    build: Callable, tmp_path
) -> None:
    model = build()
    expected = measure(model, TOKENS, make_project(tmp_path / "a").job()).tensors["harm"]
    found = measure(model.bfloat16(), TOKENS, make_project(tmp_path / "b").job()).tensors["harm"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.1)


def test_harm_is_that_of_each_row_alone(tmp_path) -> None:
    model = tiny_llama()
    together = measure(model, TOKENS, make_project(tmp_path / "all").job()).tensors["harm"]
    for number, row in enumerate(TOKENS):
        alone = measure(model, row[None], make_project(tmp_path / str(number)).job())
        torch.testing.assert_close(together[number], alone.tensors["harm"][0], atol=1e-6, rtol=1e-4)


def test_influence_is_one_minus_the_cosine_of_input_and_output() -> None:
    before, after = torch.randn(2, 3, 5, 8).double().unbind(0)
    cosine = (before * after).sum(-1) / before.norm(dim=-1) / after.norm(dim=-1)
    found = influence(before, after).double()
    torch.testing.assert_close(found, 1 - cosine.mean(-1), atol=1e-6, rtol=0)


def test_influence_is_measured_between_a_blocks_input_and_its_output(job) -> None:
    model = tiny_llama()
    states = model(TOKENS, output_hidden_states=True).hidden_states
    found = measure(model, TOKENS, job).tensors["influence"]
    for block in range(2):  # the last state is normed there
        expected = influence(states[block], states[block + 1])
        torch.testing.assert_close(found[:, block], expected)


# --- subspaces -------------------------------------------------------------------------------


def test_the_running_covariance_is_that_of_all_data_at_once() -> None:
    batches = [torch.randn(rows, 10, 6) * 3 + 5 for rows in (1, 4, 2)]
    running = RunningCovariance(6)
    for batch in batches:
        running.add(batch)
    mean, directions, variance = running.principal()
    data = torch.cat([batch.flatten(0, 1) for batch in batches]).double()
    expected = torch.cov(data.T, correction=0)
    found = directions @ variance.diag() @ directions.T
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mean.double(), data.mean(0), atol=1e-5, rtol=1e-5)
    assert (variance.diff() <= 0).all()  # largest first
    torch.testing.assert_close(directions.T @ directions, torch.eye(6), atol=1e-5, rtol=0)


def test_a_massive_direction_does_not_drown_the_others() -> None:
    scales = torch.tensor([1000.0, 1.0, 0.5, 0.1])
    data = torch.randn(8, 500, 4) * scales + torch.tensor([1000.0, 0.0, 0.0, 0.0])
    running = RunningCovariance(4)
    for part in data.split(1):
        running.add(part)
    _, _, variance = running.principal()
    expected = torch.linalg.eigvalsh(torch.cov(data.flatten(0, 1).double().T, correction=0)).flip(0)
    torch.testing.assert_close(variance.double(), expected, atol=1e-3, rtol=0.05)


def test_projecting_onto_the_full_basis_changes_nothing() -> None:
    hidden, mean = torch.randn(2, 5, 8), torch.randn(8)
    found = project(hidden, mean, random_basis(8, 8, seed=0))
    torch.testing.assert_close(found, hidden, atol=1e-5, rtol=1e-5)


def test_projecting_twice_is_projecting_once_and_leaves_the_mean() -> None:
    hidden, mean, basis = torch.randn(2, 5, 8), torch.randn(8), random_basis(8, 3, seed=0)
    once = project(hidden, mean, basis)
    torch.testing.assert_close(project(once, mean, basis), once, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(project(mean, mean, basis), mean)
    assert not torch.allclose(once, hidden, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projecting_keeps_the_type(dtype: torch.dtype) -> None:
    found = project(torch.randn(2, 8, dtype=dtype), torch.zeros(8), random_basis(8, 3, 0))
    assert found.dtype == dtype


def test_a_random_basis_is_orthonormal_and_follows_from_its_seed() -> None:
    basis = random_basis(16, 5, seed=3)
    torch.testing.assert_close(basis.T @ basis, torch.eye(5), atol=1e-5, rtol=0)
    assert torch.equal(basis, random_basis(16, 5, seed=3))
    assert not torch.equal(basis, random_basis(16, 5, seed=4))


@pytest.mark.parametrize(
    ("share", "rank"),
    [(0.1, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3), (0.875, 3), (0.95, 4), (1.0, 4)],
)
def test_the_rank_of_a_known_spectrum(share: float, rank: int) -> None:
    assert rank_holding(torch.tensor([4.0, 2.0, 1.0, 1.0, 0.0]), share) == rank


def test_the_rank_never_exceeds_the_width() -> None:
    variance = torch.rand(300).sort(descending=True).values
    assert rank_holding(variance, 1.0) <= 300


# --- the passage -----------------------------------------------------------------------------


def steps(project) -> list[tuple[str, int]]:
    return [(line["phase"], line["step"]) for line in project.curve()]


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("stopped_at", [1, 2, 3, 6, 7, 8])
def test_an_interrupted_profile_goes_on_to_the_same_bits(
    tmp_path, monkeypatch: pytest.MonkeyPatch, build: Callable, stopped_at: int
) -> None:
    model, rows = build(), TOKENS[:, :8].repeat(2, 1)[:4]
    calm = make_project(tmp_path / "calm")
    expected = measure(model, rows, calm.job())

    stopped = make_project(tmp_path / "stopped")
    stop = StopRequest()
    job = stopped.job(stop=stop)
    add = job.progress.add

    def watched(phase: str, step: int, *rest) -> None:
        add(phase, step, *rest)
        stop.requested = step == stopped_at

    monkeypatch.setattr(job.progress, "add", watched)
    with pytest.raises(Stopped, match=re.escape(f"step {stopped_at} of 8")):
        measure(model, rows, job)
    found = measure(model, rows, stopped.job())
    for name, tensor in expected.tensors.items():
        assert torch.equal(found.tensors[name].nan_to_num(), tensor.nan_to_num()), name
    assert found.branches == expected.branches
    assert steps(stopped) == steps(calm)


def test_every_block_gets_a_record_and_an_interval_around_its_harm(tmp_path) -> None:
    model, rows = tiny_llama(), TOKENS[:, :8].repeat(2, 1)[:4]
    blocks = summarise(measure(model, rows, make_project(tmp_path).job()).tensors, PARAMS)
    assert [block.block for block in blocks] == [0, 1, 2]
    for block in blocks:
        assert block.harm_low <= block.harm <= block.harm_high
        assert 1 <= block.rank_90 <= block.rank_95 <= block.rank_99 <= 32


@pytest.mark.parametrize(
    ("count", "wanted", "expected"),
    [(30, 4, [7, 14, 22, 29]), (3, 10, [0, 1, 2]), (3, 1, [2]), (1, 4, [0])],
)
def test_controls_are_spread_evenly_and_end_with_the_last_block(
    count: int, wanted: int, expected: list[int]
) -> None:
    found = control_blocks(count, wanted)
    assert len(found) == len(expected) and found[-1] == count - 1
    assert all(abs(a - b) <= 1 for a, b in zip(found, expected, strict=True))
