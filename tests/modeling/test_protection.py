"""Protected subspaces: what is protected does not move, what is not can, and budgets are held."""

import pytest
import torch
from torch import Tensor, nn

from modeling.protection import (
    InputMoments,
    extend_all,
    extend_basis,
    linear_layers,
    project,
    protected_share,
)
from tests.tiny import tiny_llama

WIDTH = 24


def inputs(rank: int, seed: int, count: int = 200, noise: float = 0.0) -> Tensor:
    """Inputs (count, WIDTH) that lie in `rank` directions, but for noise."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.randn(rank, WIDTH, generator=generator)
    spread = noise * torch.randn(count, WIDTH, generator=generator)
    return torch.randn(count, rank, generator=generator) @ axes + spread


def moment(x: Tensor) -> Tensor:
    return (x.T @ x).double()


def held(basis: Tensor, x: Tensor) -> float:
    """Share of the inputs' sum of squares that lies in a basis."""
    return ((x @ basis).square().sum() / x.square().sum()).item()


def assert_orthonormal(basis: Tensor) -> None:
    torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]), atol=1e-5, rtol=0)


def test_a_projected_step_changes_no_output_on_protected_inputs() -> None:
    x, layer = inputs(5, 0), nn.Linear(WIDTH, 7, bias=False)
    basis = extend_basis(None, moment(x), 1 - 1e-6, WIDTH)
    before, step = layer(x), torch.randn(7, WIDTH)
    with torch.no_grad():
        layer.weight += project(step, basis)
    assert basis.shape[1] == 5
    torch.testing.assert_close(layer(x), before, atol=1e-4, rtol=0)
    assert (x @ step.T).norm() > 10  # the step itself would have changed them
    other = inputs(5, 1)
    assert (other @ project(step, basis).T).norm() > 1  # and others can still be learnt


def test_a_projection_is_idempotent_and_does_nothing_without_a_basis() -> None:
    basis = extend_basis(None, moment(inputs(5, 0)), 0.99, WIDTH)
    step = torch.randn(7, WIDTH)
    once = project(step, basis)
    torch.testing.assert_close(project(once, basis), once, atol=1e-5, rtol=0)
    assert torch.equal(project(step, torch.zeros(WIDTH, 0)), step)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.95, 0.99])
def test_a_basis_is_orthonormal_and_the_smallest_that_holds_the_share(share: float) -> None:
    x = inputs(12, 3, noise=0.3)
    basis = extend_basis(None, moment(x), share, WIDTH)
    assert_orthonormal(basis)
    assert held(basis, x) >= share - 1e-6
    fewer = torch.linalg.svd(x)[2][: basis.shape[1] - 1].T  # the best one of a rank less
    assert held(fewer, x) < share


@pytest.mark.parametrize("share", [0.9, 0.99])
def test_an_extension_covers_the_old_and_the_new(share: float) -> None:
    old, new = inputs(6, 0, noise=0.1), inputs(6, 1, noise=0.1)
    first = extend_basis(None, moment(old), share, WIDTH)
    both = extend_basis(first, moment(new), share, WIDTH)
    assert_orthonormal(both)
    assert held(both, old) >= held(first, old) - 1e-5
    assert held(both, new) >= share - 1e-5
    assert held(first, new) < share
    torch.testing.assert_close(project(first.T, both), torch.zeros_like(first.T), atol=1e-5, rtol=0)


def test_what_is_covered_adds_nothing() -> None:
    x = inputs(6, 0)
    first = extend_basis(None, moment(x), 0.99, WIDTH)
    assert torch.equal(extend_basis(first, moment(2 * x[:50]), 0.5, WIDTH), first)


@pytest.mark.parametrize("most", [0, 1, 3, 100])
def test_the_budget_of_new_directions_is_held_and_the_leading_ones_are_kept(most: int) -> None:
    old, new = inputs(4, 0), inputs(30, 1)
    first = extend_basis(None, moment(old), 0.999, WIDTH)
    both = extend_basis(first, moment(new), 1.0, most)
    assert both.shape == (WIDTH, min(4 + most, WIDTH))
    left = project(new, first)
    kept = held(both, left) if most else 0.0
    best = torch.linalg.svd(left)[1].square()
    assert kept == pytest.approx((best[:most].sum() / best.sum()).item(), abs=1e-4)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_inputs_that_tell_nothing_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="no finite input was seen"):
        extend_basis(None, torch.full((4, 4), bad, dtype=torch.float64), 0.9, 4)


def test_moments_are_those_of_all_tokens_that_a_layer_of_a_real_model_got() -> None:
    model = tiny_llama(blocks=2)
    layers = linear_layers(model.model.layers, "blocks")
    assert len(layers) == 14 and "blocks.1.mlp.down_proj" in layers
    moments, caught = InputMoments(layers), []
    layer = model.model.layers[1].mlp.down_proj
    handle = layer.register_forward_pre_hook(lambda _, given: caught.append(given[0]))
    tokens = torch.arange(60).view(4, 15)
    with moments.watching():
        for part in tokens.split(2):
            model(part)
    handle.remove()
    seen = torch.cat([x.flatten(0, 1) for x in caught])
    torch.testing.assert_close(
        moments.sums["blocks.1.mlp.down_proj"], moment(seen), atol=1e-3, rtol=1e-4
    )
    before = moments.sums["blocks.0.mlp.up_proj"].clone()
    model(tokens)  # no longer watched
    assert torch.equal(moments.sums["blocks.0.mlp.up_proj"], before)


def test_a_model_whose_every_layer_is_stepped_orthogonally_answers_as_before() -> None:
    """The whole network, not one layer: no layer's input on protected rows changes either."""
    model, tokens = tiny_llama(blocks=2), torch.arange(6).view(1, 6)
    layers = linear_layers(model.model.layers, "blocks")
    moments = InputMoments(layers)
    with moments.watching():
        before = model(tokens).logits
    bases = extend_all({}, moments, 1 - 1e-7, WIDTH)
    assert 0 < protected_share(bases) < 0.25
    free = model(tokens + 40).logits
    for name, layer in layers.items():
        layer.weight += 0.1 * project(torch.randn_like(layer.weight), bases[name])
    torch.testing.assert_close(model(tokens).logits, before, atol=2e-3, rtol=0)
    assert (model(tokens + 40).logits - free).abs().max() > 0.1


def test_bases_of_layers_that_were_not_watched_stay() -> None:
    first = {"a": torch.eye(4)[:, :2]}
    moments = InputMoments({"b": nn.Linear(3, 3)})
    moments.sums["b"] += torch.eye(3)
    both = extend_all(first, moments, 0.9, 3)
    assert both["a"] is first["a"] and both["b"].shape == (3, 3) and set(first) == {"a"}
