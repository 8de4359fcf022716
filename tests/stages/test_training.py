"""TrainState: exact steps on float32 masters, bfloat16 copies, and a save that loses nothing."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from stages.learning.training import TrainState, schedule
from tests.stages.lessons import same

RATE, STEPS = 1e-2, 10


def live(dtype: torch.dtype = torch.bfloat16) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (4, 6), "b.c": (5,)}
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for name, shape in shapes.items()
    }


def state_of(parameters: dict[str, nn.Parameter], rate: float = RATE) -> TrainState:
    return TrainState(parameters.items(), rate, STEPS)


def give_gradients(parameters: dict[str, nn.Parameter], step: int) -> None:
    """Gradients that follow from the step, in the parameters' own type."""
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def steps(state: TrainState, parameters: dict[str, nn.Parameter], count: int, **how) -> list[float]:
    norms = []
    for _ in range(count):
        give_gradients(parameters, state.step)
        norms.append(state.update(**{"warmup": 0.0, "clip": 1.0, **how}))
    return norms


def saved(state: TrainState, folder: Path) -> dict[str, Tensor]:
    folder.mkdir(exist_ok=True)
    state.save(folder)
    return load_file(folder / "train.safetensors")


# --- the schedule ----------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "warmup"), [(100, 0.1), (320, 0.05), (10, 0.5), (8, 0.05)])
def test_the_rate_rises_to_its_peak_and_falls_to_a_tenth(steps: int, warmup: float) -> None:
    shares = [schedule(step, steps, warmup) for step in range(steps)]
    rise = max(1, round(warmup * steps))
    assert shares[0] == pytest.approx(1 / rise)
    assert shares[rise - 1] == shares[rise] == pytest.approx(1.0)  # the peak is reached
    assert shares[:rise] == sorted(shares[:rise])
    assert shares[rise:] == sorted(shares[rise:], reverse=True)
    assert schedule(steps, steps, warmup) == pytest.approx(0.1)
    assert 0.1 < shares[-1] < 0.1 + 25 / (steps - rise) ** 2
    assert max(shares) == pytest.approx(1.0)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.5])
def test_even_the_shortest_run_has_rates_between_nothing_and_the_peak(
    steps: int, warmup: float
) -> None:
    assert all(0.0 < schedule(step, steps, warmup) <= 1.0 for step in range(steps))


def test_without_warm_up_the_first_step_is_at_the_peak() -> None:
    assert schedule(0, 100, 0.0) == 1.0


# --- the step --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_live_weights_are_the_masters_in_their_own_type(dtype: torch.dtype, tmp_path: Path) -> None:
    parameters = live(dtype)
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    state = state_of(parameters)
    steps(state, parameters, 3)
    kept = saved(state, tmp_path)
    for name, parameter in parameters.items():
        master = kept[f"master.{name}"]
        assert master.dtype == torch.float32 and parameter.dtype == dtype
        assert torch.equal(parameter, master.to(dtype))
        assert not torch.equal(parameter, start[name])


def test_a_float32_weight_is_not_held_twice() -> None:
    parameters = live(torch.float32)
    state = state_of(parameters)
    places = {name: parameter.data_ptr() for name, parameter in parameters.items()}
    steps(state, parameters, 2)
    assert all(state._masters[name] is parameter for name, parameter in parameters.items())
    assert {name: parameter.data_ptr() for name, parameter in parameters.items()} == places


def test_a_step_is_that_of_a_plain_adamw_with_clipping_and_schedule() -> None:
    parameters = live(torch.float32)
    reference = copy.deepcopy(parameters)
    adam = torch.optim.AdamW(reference.values(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    state = state_of(parameters)
    for step in range(6):
        give_gradients(reference, step)
        expected = nn.utils.clip_grad_norm_(reference.values(), 0.5).item()
        adam.param_groups[0]["lr"] = RATE * schedule(step, STEPS, 0.2)
        adam.step()
        (norm,) = steps(state, parameters, 1, warmup=0.2, clip=0.5)
        assert norm == pytest.approx(expected, rel=1e-5)
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter, reference[name], atol=1e-6, rtol=1e-5)


def test_steps_too_small_for_bfloat16_add_up() -> None:
    """The reason for masters: at this rate, a bfloat16 weight of 1 would never move."""
    parameter = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    state = TrainState([("a", parameter)], 1e-4, 1000)
    seen = []
    for _ in range(60):
        parameter.grad = torch.ones_like(parameter)
        state.update(warmup=0.0, clip=1.0)
        seen.append(parameter[0].item())
    assert seen[:15] == [1.0] * 15
    assert 0.99 < seen[-1] < 1.0


def test_gradients_do_not_leak_into_the_next_step() -> None:
    parameters = live()
    state = state_of(parameters)
    steps(state, parameters, 1)
    assert all(parameter.grad is None for parameter in parameters.values())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_gradient_that_is_not_finite_is_refused_and_changes_nothing(
    bad: float, tmp_path: Path
) -> None:
    parameters, calm = live(), live()
    state, other = state_of(parameters), state_of(calm)
    steps(state, parameters, 2)
    steps(other, calm, 2)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    kept = saved(state, tmp_path / "before")
    give_gradients(parameters, 2)
    parameters["b.c"].grad[1] = bad
    with pytest.raises(FloatingPointError, match="at step 3; lower the learning rate .now 0.01"):
        state.update(warmup=0.0, clip=1.0)
    assert same(saved(state, tmp_path / "after"), kept)
    assert all(torch.equal(parameters[name], before[name]) for name in parameters)
    steps(state, parameters, 3)  # and nothing of it comes back later
    steps(other, calm, 3)
    assert all(torch.equal(parameters[name], calm[name]) for name in parameters)


def test_all_that_is_handed_over_is_trained() -> None:
    parameters = live()
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    state_of(parameters)
    assert all(parameter.requires_grad for parameter in parameters.values())


# --- saving ----------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 1, 4, 9])
def test_what_is_saved_and_loaded_goes_on_to_the_same_bits(at: int, tmp_path: Path) -> None:
    whole, first, second = live(), live(), live()
    calm, stopped, resumed = state_of(whole), state_of(first), state_of(second)
    norms = steps(calm, whole, STEPS)
    steps(stopped, first, at)
    (tmp_path / "step").mkdir()
    stopped.save(tmp_path / "step")
    for parameter in second.values():  # a student is built anew; what it holds then is no matter
        parameter.data.zero_()
    resumed.load(tmp_path / "step")
    assert resumed.step == at
    assert all(torch.equal(second[name], first[name]) for name in first)
    assert steps(resumed, second, STEPS - at) == norms[at:]
    assert all(torch.equal(second[name], whole[name]) for name in whole)
    assert same(saved(resumed, tmp_path / "one"), saved(calm, tmp_path / "other"))


def test_everything_that_a_step_changes_is_saved(tmp_path: Path) -> None:
    parameters = live()
    state = state_of(parameters)
    steps(state, parameters, 2)
    parts = {f"{part}.{n}" for part in ("master", "exp_avg", "exp_avg_sq", "step") for n in live()}
    assert saved(state, tmp_path).keys() == parts | {"step", "scale"}


def test_loading_again_and_again_is_loading_once(tmp_path: Path) -> None:
    parameters = live()
    state = state_of(parameters)
    steps(state, parameters, 3)
    kept = saved(state, tmp_path)
    steps(state, parameters, 4)
    for _ in range(2):
        state.load(tmp_path)
    assert same(saved(state, tmp_path / "again"), kept)


# --- protection ------------------------------------------------------------------------------


def test_protected_inputs_get_the_same_answers_after_steps_of_adam() -> None:
    """Adam divides by element, which turns a projected gradient back: the step is projected too."""
    parameters = live(torch.float32)
    basis = torch.linalg.qr(torch.randn(6, 2, generator=torch.Generator().manual_seed(1)))[0]
    before = {name: parameter.detach().clone() for name, parameter in live(torch.float32).items()}
    named = {"a.weight": parameters["a"], "b.c": parameters["b.c"]}
    state = TrainState(named.items(), RATE, STEPS, {"a": basis, "elsewhere": torch.eye(3)})
    steps(state, parameters, STEPS)
    moved = parameters["a"].detach() - before["a"]
    assert moved.norm() > RATE
    torch.testing.assert_close(moved @ basis, torch.zeros(4, 2), atol=1e-6, rtol=0)
    assert not torch.equal(parameters["b.c"], before["b.c"])


def test_a_protected_state_goes_on_to_the_bit(tmp_path: Path) -> None:
    basis = torch.eye(6)[:, :3]
    results = []
    for stop in (None, 4):
        parameters = live()
        named = {"a.weight": parameters["a"], "b.c": parameters["b.c"]}
        state = TrainState(named.items(), RATE, STEPS, {"a": basis})
        if stop:
            steps(state, parameters, stop)
            (tmp_path / "at").mkdir()
            state.save(tmp_path / "at")
            state = TrainState(named.items(), RATE, STEPS, {"a": basis})
            state.load(tmp_path / "at")
        steps(state, parameters, STEPS - (stop or 0))
        results.append(saved(state, tmp_path / str(stop)))
    assert same(*results)
