"""Readings of blocks are what autograd and cutting say, whatever the batch and the padding."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config

from modeling.block_readings import read_blocks
from modeling.block_sites import Site, find_sites, kv_groups
from tests.tiny import tiny_gpt2, tiny_llama, tiny_mamba

TOKENS = torch.arange(3 * 12).view(3, 12).mul(31).remainder(97)


def tiny_gemma2():
    """A model that caps its logits, far below those that it has."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


every_model = pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_mamba, tiny_gemma2])


def sites_of(model) -> list[Site]:
    found = find_sites(model, neurons=8, channels=8)
    return found + kv_groups(found, model) if any(s.kind == "head" for s in found) else found


def loss_with(model, tokens: Tensor, site: Site | None = None, at: int = 0, by: float = 0.0):
    """The summed loss with a block's activation scaled by 1 - `by`."""

    def scale(_, given: tuple[Tensor]) -> tuple[Tensor]:
        factor = torch.ones_like(given[0])
        factor[..., at * site.size : (at + 1) * site.size] -= by
        return (given[0] * factor,)

    hooks = [model.get_submodule(site.module).register_forward_pre_hook(scale)] if site else []
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits[:, :-1].double().log_softmax(-1)
    for hook in hooks:
        hook.remove()
    return -logits.gather(-1, tokens[:, 1:, None]).sum().item()


@every_model
def test_the_loss_is_the_models_own(make: Callable) -> None:
    model = make()
    loss, _ = read_blocks(model, TOKENS, sites_of(model))
    assert loss == pytest.approx(loss_with(model, TOKENS), rel=1e-5)


@every_model
def test_gradients_are_those_of_explicit_copies(make: Callable) -> None:
    model = make().requires_grad_(True)
    sites = sites_of(model)
    copies: dict[str, Tensor] = {}

    def copy(name: str) -> Callable:
        def hook(_, given: tuple[Tensor]) -> tuple[Tensor]:
            copies[name] = given[0].clone()
            copies[name].retain_grad()
            return (copies[name],)

        return hook

    names = {site.module for site in sites}
    hooks = [model.get_submodule(n).register_forward_pre_hook(copy(n)) for n in names]
    logits = model(TOKENS, use_cache=False).logits[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, TOKENS[:, 1:].flatten(), reduction="sum").backward()
    for hook in hooks:
        hook.remove()
    _, readings = read_blocks(make(), TOKENS, sites)
    for site, reading in zip(sites, readings, strict=True):
        x = copies[site.module]
        shape = (*TOKENS.shape, site.count, site.size)
        activations, gradients = x.detach().view(shape), x.grad.view(shape)
        torch.testing.assert_close(reading.activation, activations.norm(dim=-1))
        torch.testing.assert_close(reading.gradient, gradients.norm(dim=-1), rtol=1e-5, atol=1e-6)
        taylor = (activations * gradients).sum(-1)
        torch.testing.assert_close(reading.taylor, taylor, rtol=1e-4, atol=1e-6)
        assert (reading.gradient[:, :-1] > 0).all(), "a block without gradient"


@every_model
def test_taylor_is_what_a_little_cutting_changes(make: Callable) -> None:
    model = make()
    sites = sites_of(model)
    _, readings = read_blocks(model, TOKENS, sites)
    for site, reading in zip(sites, readings, strict=True):
        for at in (0, site.count - 1):
            slope = (
                loss_with(model, TOKENS, site, at, 0.02) - loss_with(model, TOKENS, site, at, -0.02)
            ) / 0.04
            assert -reading.taylor[..., at].sum().item() == pytest.approx(slope, rel=0.02, abs=2e-3)


@every_model
def test_rows_are_read_alike_together_alone_and_padded(make: Callable) -> None:
    model = make()
    sites = sites_of(model)
    _, together = read_blocks(model, TOKENS, sites)
    real = torch.ones(3, 17, dtype=torch.bool)
    real[:, 12:] = False
    _, padded = read_blocks(model, torch.nn.functional.pad(TOKENS, (0, 5)), sites, real)
    for row in range(3):
        _, alone = read_blocks(model, TOKENS[row : row + 1], sites)
        for one, all_rows, more in zip(alone, together, padded, strict=True):
            for name in ("activation", "gradient", "taylor"):
                expected = getattr(one, name)[0]
                for found in (getattr(all_rows, name)[row], getattr(more, name)[row, :12]):
                    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            assert not more.activation[row, 12:].any() and not more.gradient[row, 12:].any()


def test_weights_get_no_gradient_and_keep_their_wish_for_one() -> None:
    model = tiny_llama().requires_grad_(True)
    read_blocks(model, TOKENS, sites_of(model))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())
