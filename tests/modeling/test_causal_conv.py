"""The short convolution: torch's own grouped one as the reference, and its gradients."""

import pytest
import torch
from torch.nn.functional import conv1d, silu

from modeling.causal_conv import causal_conv1d


def inputs(tokens: int, taps: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, tokens), (3, taps), (3,))
    return tuple(
        torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in shapes
    )


@pytest.mark.parametrize("tokens", [1, 2, 4, 9])
def test_it_is_torchs_convolution_and_silu(tokens: int) -> None:
    x, weight, bias = inputs(tokens)
    for offset in (bias, None):
        padded = conv1d(x, weight[:, None], offset, padding=3, groups=3)[:, :, :tokens]
        torch.testing.assert_close(causal_conv1d(x, weight, offset, "silu"), silu(padded))


@pytest.mark.parametrize("tokens", [1, 3, 7])
def test_its_gradients_are_those_of_finite_differences(tokens: int) -> None:
    values = inputs(tokens)
    assert torch.autograd.gradcheck(lambda *given: causal_conv1d(*given, "silu"), values)
    x, weight, _ = values
    assert torch.autograd.gradcheck(lambda *given: causal_conv1d(*given, None, "silu"), (x, weight))


def test_another_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="not for the activation 'gelu'"):
        causal_conv1d(*inputs(4), "gelu")
