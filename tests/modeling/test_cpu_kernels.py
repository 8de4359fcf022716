"""CPU kernels: gradients are those of finite differences, values those of transformers' modules."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from modeling.blocks import dissect
from modeling.cpu_kernels import causal_attention, gated_mlp, rms_norm
from tests.tiny import tiny_llama

TYPES = {
    torch.float32: 1e-5,
    torch.bfloat16: 3e-2,
}  # and the relative error that its rounding makes
every_type = pytest.mark.parametrize("dtype", TYPES, ids=str)


def numbers(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def value_and_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    inputs = tuple(part.detach().clone().requires_grad_() for part in inputs)
    value = function(*inputs)
    pull = torch.randn(value.shape, generator=torch.Generator().manual_seed(9))
    value.backward(pull.to(value.dtype))
    return [value.detach(), *(part.grad for part in inputs)]


def assert_close(found: list[Tensor], wanted: list[Tensor], error: float) -> None:
    for place, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert one.shape == other.shape and one.dtype == other.dtype
        distance = (one.double() - other.double()).norm() / other.double().norm()
        assert distance < error, f"number {place} is off by {distance:.1e}"


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 2), (3, 3), (4, 1)])
def test_the_gradients_of_attention_are_those_of_finite_differences(
    heads: int, key_heads: int
) -> None:
    inputs = (
        numbers(2, n, 5, 3, seed=place) for place, n in enumerate((heads, key_heads, key_heads))
    )
    assert torch.autograd.gradcheck(lambda q, k, v: causal_attention(q, k, v, 0.4), tuple(inputs))


def test_the_gradients_of_a_norm_are_those_of_finite_differences() -> None:
    assert torch.autograd.gradcheck(
        lambda x, w: rms_norm(x, w, 1e-2), (numbers(2, 3, 6), numbers(6))
    )


def test_the_gradients_of_an_mlp_are_those_of_finite_differences() -> None:
    assert torch.autograd.gradcheck(
        gated_mlp, (numbers(2, 3, 4), numbers(7, 4), numbers(7, 4, seed=1), numbers(4, 7))
    )


@every_type
def test_attention_equals_torchs_own(dtype: torch.dtype) -> None:
    query, key, value = (  # as a model has them: heads before tokens in shape, behind in memory
        numbers(2, 33, heads, 8, dtype=dtype, seed=place).detach().transpose(1, 2)
        for place, heads in enumerate((6, 2, 2))
    )

    def own(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return output.transpose(1, 2)

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return causal_attention(query, key, value, 8**-0.5)

    inputs = (query, key, value)
    assert_close(
        value_and_gradients(ours, *inputs), value_and_gradients(own, *inputs), TYPES[dtype]
    )


@every_type
def test_norm_and_mlp_equal_a_llamas_own(dtype: torch.dtype) -> None:
    block = dissect(tiny_llama().to(dtype)).blocks[0]
    norm, mlp = block.input_layernorm, block.mlp
    hidden = numbers(2, 7, 32, dtype=dtype)
    weights = [linear.weight for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
    error = TYPES[dtype]
    assert_close(
        value_and_gradients(lambda x: gated_mlp(x, *weights), hidden),
        value_and_gradients(mlp, hidden), error,
    )  # fmt: skip
    assert_close(
        value_and_gradients(lambda x: rms_norm(x, norm.weight, norm.variance_epsilon), hidden),
        value_and_gradients(norm, hidden), error,
    )  # fmt: skip


def test_a_frozen_weight_gets_no_gradient() -> None:
    hidden, gate, up, down = numbers(3, 4), numbers(7, 4), numbers(7, 4), numbers(4, 7)
    weight = numbers(4)
    for frozen in (gate, down, weight):
        frozen.requires_grad_(False)
    gated_mlp(rms_norm(hidden, weight, 1e-3), gate, up, down).sum().backward()
    assert up.grad is not None and hidden.grad is not None
    assert all(frozen.grad is None for frozen in (gate, down, weight))
