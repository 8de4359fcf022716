"""Optimizers: their state goes into a checkpoint and back to the bit; what is missing is named."""

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from stages.learning.optimizers import check_optimizer, make_optimizer
from stages.learning.training import TrainState
from tests.stages.test_distill import params

has_bitsandbytes = importlib.util.find_spec("bitsandbytes") is not None
RATE, STEPS = 1e-2, 10
NAMES = [
    "adamw",
    pytest.param(
        "adamw_8bit",
        marks=pytest.mark.skipif(not has_bitsandbytes, reason="needs bitsandbytes"),
    ),
]
every_optimizer = pytest.mark.parametrize("name", NAMES)


def live() -> dict[str, nn.Parameter]:
    """A matrix that is large enough for 8 bits, and one that is not."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"large": (72, 64), "small": (5,)}
    return {n: nn.Parameter(torch.randn(s, generator=generator)) for n, s in shapes.items()}


def steps(state: TrainState, parameters: dict[str, nn.Parameter], count: int) -> None:
    """Towards zero: the gradient of the sum of squares."""
    for _ in range(count):
        for parameter in parameters.values():
            parameter.grad = 2 * parameter.detach().clone()
        state.update(warmup=0.0, clip=1e3)


def saved(state: TrainState, folder: Path) -> dict[str, Tensor]:
    folder.mkdir(exist_ok=True)
    state.save(folder)
    return load_file(folder / "train.safetensors")


@every_optimizer
def test_an_interrupted_optimizer_goes_on_to_the_same_bits(tmp_path: Path, name: str) -> None:
    results = []
    for stop in (None, 4):
        parameters = live()
        state = TrainState(parameters.items(), RATE, STEPS, optimizer=name)
        if stop:
            steps(state, parameters, stop)
            saved(state, tmp_path / "at")
            parameters = live()
            state = TrainState(parameters.items(), RATE, STEPS, optimizer=name)
            state.load(tmp_path / "at")
        steps(state, parameters, STEPS - (stop or 0))
        results.append(saved(state, tmp_path / str(stop)))
    one, other = results
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@every_optimizer
def test_going_back_to_before_the_first_step_forgets_the_moments(tmp_path: Path, name: str) -> None:
    parameters = live()
    state = TrainState(parameters.items(), RATE, STEPS, optimizer=name)
    fresh = saved(state, tmp_path / "fresh")
    steps(state, parameters, 3)
    state.load(tmp_path / "fresh")
    assert saved(state, tmp_path / "back").keys() == fresh.keys()


@every_optimizer
def test_an_optimizer_goes_downhill(name: str) -> None:
    parameters = live()
    state = TrainState(parameters.items(), RATE, 40, optimizer=name)
    before = sum(parameter.square().sum().item() for parameter in parameters.values())
    steps(state, parameters, 40)
    after = sum(parameter.square().sum().item() for parameter in parameters.values())
    assert after < 0.8 * before


@pytest.mark.skipif(not has_bitsandbytes, reason="needs bitsandbytes")
def test_eight_bits_hold_the_moments_of_what_is_large(tmp_path: Path) -> None:
    parameters = live()
    state = TrainState(parameters.items(), RATE, STEPS, optimizer="adamw_8bit")
    steps(state, parameters, 2)
    found = saved(state, tmp_path)
    assert found["state1.large"].dtype == found["state2.large"].dtype == torch.uint8
    assert found["state1.small"].dtype == torch.float32


@pytest.mark.skipif(has_bitsandbytes, reason="bitsandbytes is there")
def test_what_is_missing_for_eight_bits_is_named() -> None:
    with pytest.raises(ValueError, match="'adamw_8bit' needs bitsandbytes.*pip install"):
        make_optimizer("adamw_8bit", live().values(), RATE)


def test_an_unknown_optimizer_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown optimizer 'sgd'; use adamw or adamw_8bit"):
        check_optimizer("sgd")
    with pytest.raises(ValueError, match="'optimizer' is 'sgd'"):
        params(optimizer="sgd")
