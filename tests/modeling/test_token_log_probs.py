"""Log-probabilities of chosen tokens: values and gradients equal a dense computation."""

import pytest
import torch
from torch import Tensor

import modeling.token_log_probs
from modeling.losses import text_loss
from modeling.token_log_probs import token_log_probs

N, D, V = 11, 8, 29


def example() -> tuple[Tensor, Tensor, Tensor]:
    """hidden (N, D), head (V, D), chosen (N,); float64."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator, dtype=torch.float64)
    head = torch.randn(V, D, generator=generator, dtype=torch.float64)
    return hidden, head, torch.randint(V, (N,), generator=generator)


@pytest.mark.parametrize("chunk", [1, 4, 512])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_values_and_gradients_equal_a_dense_computation(
    chunk: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modeling.token_log_probs, "CHUNK_TOKENS", chunk)
    hidden, head, chosen = example()
    weights = torch.linspace(-1, 2, N, dtype=torch.float64)
    dense = hidden.clone().requires_grad_()
    log_probs = (dense @ head.T / temperature).log_softmax(-1)
    expected = log_probs.gather(-1, chosen[:, None])[:, 0]
    (expected * weights).sum().backward()
    ours = hidden.clone().requires_grad_()
    found, entropy = token_log_probs(ours, head, chosen, temperature)
    (found * weights).sum().backward()
    torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.grad, dense.grad, rtol=1e-4, atol=1e-5)
    wanted = -(log_probs.exp() * log_probs).sum(-1).detach()
    torch.testing.assert_close(entropy.double(), wanted, rtol=1e-5, atol=1e-5)


def test_the_mean_of_minus_log_probabilities_is_the_loss_of_the_text() -> None:
    hidden, head, chosen = (t.float() if t.is_floating_point() else t for t in example())
    by_loss, by_log_probs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    loss = text_loss(by_loss, head, chosen)
    loss.backward()
    found, _ = token_log_probs(by_log_probs, head, chosen)
    (-found.mean()).backward()
    torch.testing.assert_close(-found.mean(), loss)
    torch.testing.assert_close(by_log_probs.grad, by_loss.grad, rtol=1e-4, atol=1e-6)


def test_no_token_gives_no_number() -> None:
    hidden, head, chosen = example()
    found, entropy = token_log_probs(hidden[:0].requires_grad_(), head, chosen[:0])
    assert len(found) == len(entropy) == 0
    found.sum().backward()
