"""Layers with adapters: their gradients, and that a model computes the same with them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from modeling.adapted_kernels import AdaptedLayer, adapted_linear, adapted_mlp
from modeling.fast_path import fast_path
from modeling.lora import (
    AdapterShape,
    adapt,
    as_reference,
    keep_reference,
    merged,
    save_adapter,
    trainable,
)
from tests.tiny import tiny_llama

TOKENS = torch.arange(2 * 12).reshape(2, 12).remainder(97)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def layer(inputs: int, outputs: int, rank: int = 2) -> AdaptedLayer:
    down, up = random(rank, inputs).requires_grad_(), random(outputs, rank).requires_grad_()
    return AdaptedLayer(random(outputs, inputs), random(outputs), down, up, 0.7)


def test_the_gradients_of_a_layer_are_right() -> None:
    torch.manual_seed(0)
    given, hidden = layer(4, 5), random(2, 3, 4).requires_grad_()

    def of(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return adapted_linear(x, AdaptedLayer(given.weight, given.bias, down, up, given.scale))

    expected = hidden @ given.weight.T + given.bias + 0.7 * hidden @ given.down.T @ given.up.T
    torch.testing.assert_close(adapted_linear(hidden, given), expected)
    assert torch.autograd.gradcheck(of, (hidden, given.down, given.up))


@pytest.mark.parametrize("bare", [None, 0, 2])
def test_the_gradients_of_an_mlp_are_right_whichever_layers_have_an_adapter(bare) -> None:
    torch.manual_seed(0)
    shapes = ((4, 6), (4, 6), (6, 4))
    layers = [
        AdaptedLayer(random(o, i)) if place == bare else layer(i, o)
        for place, (i, o) in enumerate(shapes)
    ]
    hidden = random(3, 4).requires_grad_()
    learnt = [factor for one in layers if one.down is not None for factor in (one.down, one.up)]

    def of(x: Tensor, *factors: Tensor) -> Tensor:
        pairs = iter(factors)
        given = (
            one if one.down is None else replace(one, bias=None, down=next(pairs), up=next(pairs))
            for one in layers
        )
        return adapted_mlp(x, *given)

    assert torch.autograd.gradcheck(of, (hidden, *learnt))


@pytest.fixture
def adapted(tmp_path: Path):
    """A model with an adapter whose factors are both something."""
    made = adapt(tiny_llama(), AdapterShape(4, 8.0, "lora"), 0, tmp_path / "start")
    save_adapter(made, tmp_path / "adapter", tmp_path / "start")
    torch.manual_seed(1)
    for name, parameter in trainable(made):
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    keep_reference(made, tmp_path / "adapter")
    return made


def loss_and_gradients(adapted) -> tuple[float, list[Tensor]]:
    adapted.zero_grad()
    loss = adapted(TOKENS, labels=TOKENS).loss
    loss.backward()
    return loss.item(), [parameter.grad.clone() for _, parameter in trainable(adapted)]


def test_a_model_with_an_adapter_computes_the_same_on_the_fast_path(adapted) -> None:
    own = loss_and_gradients(adapted)
    said: list[str] = []
    with fast_path(adapted.get_base_model(), said.append):
        torch.testing.assert_close(loss_and_gradients(adapted), own, rtol=1e-3, atol=1e-5)
    assert said == []
    assert loss_and_gradients(adapted)[0] == own[0]


def test_adapters_may_change_while_the_fast_path_lasts(adapted) -> None:
    def logits() -> Tensor:
        with torch.no_grad():
            return adapted(TOKENS).logits

    own = logits()
    with as_reference(adapted):
        of_reference = logits()
    with fast_path(adapted.get_base_model(), print):
        with as_reference(adapted):
            torch.testing.assert_close(logits(), of_reference)
        with merged(adapted):
            torch.testing.assert_close(logits(), own, rtol=1e-4, atol=1e-4)
        with adapted.disable_adapter():
            torch.testing.assert_close(logits(), of_reference)  # an adapter that has learnt nothing
    assert not torch.allclose(own, of_reference)


@pytest.mark.parametrize("variant", ["dora", "rslora"])
def test_other_variants_compute_the_same_too(tmp_path: Path, variant: str) -> None:
    adapted = adapt(tiny_llama(), AdapterShape(4, 8.0, variant), 0, tmp_path)
    own = loss_and_gradients(adapted)
    said: list[str] = []
    with fast_path(adapted.get_base_model(), said.append):
        torch.testing.assert_close(loss_and_gradients(adapted), own, rtol=1e-3, atol=1e-5)
    assert bool(said) is (variant == "dora")  # its magnitudes keep PEFT's code
