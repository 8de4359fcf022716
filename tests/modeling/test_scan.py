"""The selective scan: its gradients, transformers' own scan as the reference, and nothing left."""

import copy

import pytest
import torch
from transformers.models.mamba import modeling_mamba

from modeling import scan
from modeling.scan import fast_scan, selective_scan
from tests.tiny import tiny_llama, tiny_mamba

TOKENS = torch.arange(2 * 13).view(2, 13) % 97


def scan_inputs(rows: int = 2, width: int = 3, states: int = 2, tokens: int = 5) -> dict:
    """Random arguments of a scan, in float64, all of them with gradients."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shapes = {
        "hidden_states": (rows, width, tokens), "dt": (rows, width, tokens), "A": (width, states),
        "B": (rows, states, tokens), "C": (rows, states, tokens), "D": (width,),
        "z": (rows, width, tokens), "delta_bias": (width,),
    }  # fmt: skip
    made = {name: random(*shape) for name, shape in shapes.items()}
    made["A"] = -made["A"].exp()
    return {name: tensor.requires_grad_() for name, tensor in made.items()}


@pytest.fixture(params=[1, 30, 1 << 20], ids=["a-step-a-piece", "some-pieces", "one-piece"])
def pieces(request, monkeypatch) -> None:
    monkeypatch.setattr(scan, "PIECE_ELEMENTS", request.param)


def gradients(model, fast: bool) -> dict[str, torch.Tensor]:
    model.zero_grad()
    if fast:
        with fast_scan(model):
            loss = model(TOKENS, labels=TOKENS, use_cache=False).loss
    else:
        loss = model(TOKENS, labels=TOKENS, use_cache=False).loss
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_gradients_are_those_of_finite_differences(pieces) -> None:
    inputs = scan_inputs()

    def function(*values):
        arguments = dict(zip(inputs, values, strict=True))
        return selective_scan(**arguments, delta_softplus=True, return_last_state=True)

    assert torch.autograd.gradcheck(function, tuple(inputs.values()))


def test_output_and_last_state_are_those_of_transformers(pieces) -> None:
    inputs = {name: tensor.detach().float() for name, tensor in scan_inputs(tokens=11).items()}
    options = {"delta_softplus": True, "return_last_state": True}
    ours, our_state = selective_scan(**inputs, **options)
    theirs, their_state = modeling_mamba.mamba_selective_scan(**inputs, **options)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(our_state, their_state)


def test_a_model_learns_what_it_would_learn_without_it() -> None:
    model = tiny_mamba().requires_grad_(True)
    theirs, ours = gradients(model, fast=False), gradients(model, fast=True)
    assert theirs.keys() == ours.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_padding_is_left_out_as_transformers_does() -> None:
    model = tiny_mamba()
    mask = torch.ones_like(TOKENS)
    mask[0, :4] = 0
    expected = model(TOKENS, attention_mask=mask).logits
    with fast_scan(model):
        torch.testing.assert_close(model(TOKENS, attention_mask=mask).logits, expected)


def test_generation_goes_on_from_the_state_of_the_scan() -> None:
    model = tiny_mamba()
    expected = model.generate(TOKENS[:, :6], max_new_tokens=6, do_sample=False)
    with fast_scan(model):
        assert torch.equal(
            model.generate(TOKENS[:, :6], max_new_tokens=6, do_sample=False), expected
        )


def test_bfloat16_goes_in_and_comes_out() -> None:
    inputs = {name: tensor.detach() for name, tensor in scan_inputs().items()}
    exact = selective_scan(**inputs, delta_softplus=True)
    rounded = {name: tensor.bfloat16() for name, tensor in inputs.items()}
    found = selective_scan(**rounded, delta_softplus=True)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=0.05, atol=0.1)


def test_nothing_is_left_behind_even_by_an_error() -> None:
    model, other = tiny_mamba(), tiny_mamba(seed=1)
    original = modeling_mamba.mamba_selective_scan
    with pytest.raises(RuntimeError, match="in the middle"), fast_scan(model):
        assert "forward" in vars(model.backbone.layers[0].mixer)
        assert "forward" not in vars(other.backbone.layers[0].mixer)
        assert modeling_mamba.mamba_selective_scan is original
        raise RuntimeError("in the middle")
    assert not any("forward" in vars(module) for module in model.modules())


def test_one_inside_the_other_ends_with_the_outer() -> None:
    model = tiny_mamba()
    mixer = model.backbone.layers[0].mixer
    with fast_scan(model):
        with fast_scan(model):
            pass
        assert "forward" in vars(mixer)
    assert "forward" not in vars(mixer)


def test_a_copy_made_inside_runs_its_own_weights() -> None:
    model = tiny_mamba()
    with fast_scan(model):
        twin = copy.deepcopy(model)
    twin.backbone.layers[0].mixer.in_proj.weight.data.zero_()
    before = model(TOKENS).logits
    assert not torch.allclose(twin(TOKENS).logits, before)


def test_a_model_without_mamba_blocks_is_refused() -> None:
    with (
        pytest.raises(ValueError, match="LlamaForCausalLM has no MambaMixer"),
        fast_scan(tiny_llama()),
    ):
        pass


def test_a_gate_a_skip_or_a_bias_can_be_left_out() -> None:
    inputs = scan_inputs(tokens=4)
    for absent in ("z", "D", "delta_bias"):
        left = {name: tensor for name, tensor in inputs.items() if name != absent}
        theirs = modeling_mamba.mamba_selective_scan(**left, delta_softplus=True)
        ours = selective_scan(**left, delta_softplus=True)
        torch.testing.assert_close(ours, theirs, check_dtype=False)
        for a, b in zip(
            torch.autograd.grad(ours.sum(), left.values()),
            torch.autograd.grad(theirs.sum(), left.values()),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_it_equals_the_kernels_of_mamba_ssm() -> None:
    interface = pytest.importorskip("mamba_ssm.ops.selective_scan_interface")
    inputs = scan_inputs(width=64, states=16, tokens=48)
    here = {name: tensor.detach().float().requires_grad_() for name, tensor in inputs.items()}
    there = {name: tensor.detach().cuda().requires_grad_() for name, tensor in here.items()}
    ours, state = selective_scan(**here, delta_softplus=True, return_last_state=True)
    u, dt = there["hidden_states"], there["dt"]
    theirs, their_state = interface.selective_scan_fn(
        u, dt, *(there[name] for name in ("A", "B", "C", "D", "z", "delta_bias")),
        delta_softplus=True, return_last_state=True,
    )  # fmt: skip
    torch.testing.assert_close(ours, theirs.cpu(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state, their_state.cpu(), rtol=1e-4, atol=1e-4)
    ours.sum().backward()
    theirs.sum().backward()
    for name, tensor in here.items():
        torch.testing.assert_close(tensor.grad, there[name].grad.cpu(), rtol=1e-3, atol=1e-3)
