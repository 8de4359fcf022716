"""The loss of sampled targets: its formula to the bit of a dense one, and right on average."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import modeling.losses
from modeling.losses import SampledTargets, head_loss
from modeling.samples import Samples, draw_keys
from tests.modeling.test_losses import D, N, V, example, gradient_of, sparse_targets


def sampled_targets(logits: Tensor, draws: int, seed: int = 0) -> SampledTargets:
    """Targets as `extract` draws them and as its shards give them back: padded."""
    keys = draw_keys(seed, torch.arange(len(logits)), draws)
    samples = Samples.none_yet(keys).see(logits.float(), keys, 0)
    ids, counts, distinct = samples.counted()
    there = torch.arange(int(distinct.max())) < distinct[:, None]
    padded = torch.zeros(there.shape, dtype=torch.int64)
    shares = padded.masked_scatter(there, counts).float() / draws
    return SampledTargets(
        padded.masked_scatter(there, ids), shares, samples.mean_log_prob().float()
    )


def dense_shares(targets: SampledTargets) -> Tensor:
    """The empirical distribution over the whole vocabulary, (N, V)."""
    return torch.zeros(N, V).scatter_add_(-1, targets.ids, targets.shares).double()


@pytest.mark.parametrize("draws", [1, 5, 300])
@pytest.mark.parametrize(("kd_weight", "ce_weight"), [(1.0, 0.0), (0.0, 1.0), (0.7, 0.4)])
def test_value_and_gradient_equal_a_dense_computation(
    draws: int, kd_weight: float, ce_weight: float
) -> None:
    hidden, head, labels, teacher = example(1)
    targets = sampled_targets(teacher, draws)
    reference = hidden.clone().requires_grad_()
    log_q = (reference @ head.T).log_softmax(-1)
    kl = (targets.log_prob.double() - (dense_shares(targets) * log_q).sum(-1)).mean()
    ce = cross_entropy(reference @ head.T, labels)
    (kd_weight * kl + ce_weight * ce).backward()

    single = (part.float() for part in (hidden, head))
    loss, found_kl, found_ce, gradient = gradient_of(
        *single, labels, targets, kd_weight, ce_weight, 1.0
    )
    assert found_kl == pytest.approx(kl.item(), rel=1e-4, abs=1e-5)
    assert found_ce == pytest.approx(ce.item(), rel=1e-5)
    assert loss.item() == pytest.approx(kd_weight * found_kl + ce_weight * found_ce, rel=1e-5)
    torch.testing.assert_close(gradient.double(), reference.grad, atol=2e-6, rtol=1e-3)


def test_the_gradient_passes_gradcheck() -> None:
    """Steps of a hundredth, because the loss is computed in float32."""
    hidden, head, labels, teacher = example(1)
    targets = sampled_targets(teacher, 20)

    def loss(hidden: Tensor) -> Tensor:
        return head_loss(hidden, head, labels, targets, 0.7, 0.4, 1.0)[0].double()

    hidden = hidden.requires_grad_()
    assert torch.autograd.gradcheck(loss, hidden, eps=1e-2, atol=2e-4, rtol=1e-2)


def test_on_average_value_and_gradient_are_those_of_the_whole_distribution() -> None:
    hidden, head, labels, teacher = example(1)
    reference = hidden.clone().requires_grad_()
    p, log_q = teacher.softmax(-1), (reference @ head.T).log_softmax(-1)
    kl = (p * (teacher.log_softmax(-1) - log_q)).sum(-1).mean()
    kl.backward()
    values, gradients = [], []
    for seed in range(400):
        targets = sampled_targets(teacher, 8, seed)
        _, value, _, gradient = gradient_of(hidden, head, labels, targets, 1.0, 0.0, 1.0)
        values.append(value)
        gradients.append(gradient)
    for found, wanted in (
        (torch.tensor(values, dtype=torch.float64), kl.detach()),
        (torch.stack(gradients), reference.grad),
    ):
        error = found.std(0) / math.sqrt(len(found))
        assert ((found.mean(0) - wanted).abs() / error).max() < 4.5
    top = gradient_of(hidden, head, labels, sparse_targets(teacher, 8), 1.0, 0.0, 1.0)[-1]
    biased, unbiased = (
        (one - reference.grad).norm() for one in (top, torch.stack(gradients).mean(0))
    )
    assert unbiased < 0.5 * biased  # no number of seeds helps a top k


def test_a_model_has_no_divergence_from_itself() -> None:
    hidden, head, labels, _ = example(1)
    hidden, head = hidden.float(), head.float()
    targets = sampled_targets(hidden @ head.T, 6)
    _, kl, _, gradient = gradient_of(hidden, head, labels, targets, 1.0, 0.0, 1.0)
    assert kl == pytest.approx(0.0, abs=1e-5)
    assert gradient.abs().max() > 1e-3  # which single draws cannot tell


@pytest.mark.parametrize("chunk", [1, 3, N, 1000])
def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    hidden, head, labels, teacher = (
        part.float() if part.is_floating_point() else part for part in example(1)
    )
    arguments = (hidden, head, labels, sampled_targets(teacher, 9), 0.7, 0.4, 1.0)
    expected = gradient_of(*arguments)
    monkeypatch.setattr(modeling.losses, "CHUNK_TOKENS", chunk)
    for found, wanted in zip(gradient_of(*arguments), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


def test_what_a_share_of_nothing_names_does_not_matter() -> None:
    hidden, head, labels, teacher = example(1)
    targets = sampled_targets(teacher, 9)
    assert (targets.shares == 0).any() and hidden.shape == (N, D)
    other = SampledTargets(
        torch.where(targets.shares == 0, V - 1, targets.ids), targets.shares, targets.log_prob
    )
    one, two = (gradient_of(hidden, head, labels, t, 0.7, 0.4, 1.0) for t in (targets, other))
    for found, wanted in zip(one, two, strict=True):
        torch.testing.assert_close(found, wanted)


def test_bfloat16_comes_close_to_float64() -> None:
    hidden, head, labels, teacher = example(1)
    hidden, head = hidden.bfloat16(), head.bfloat16()
    targets = sampled_targets(teacher, 20)
    *_, single = gradient_of(hidden, head, labels, targets, 1.0, 1.0, 1.0)
    *_, double = gradient_of(hidden.double(), head.double(), labels, targets, 1.0, 1.0, 1.0)
    assert single.dtype == torch.bfloat16
    assert torch.cosine_similarity(single.double().flatten(), double.flatten(), 0) > 0.999


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_another_temperature_is_refused(temperature: float) -> None:
    hidden, head, labels, teacher = example(1)
    with pytest.raises(ValueError, match=f"temperature is {temperature:g}.*temperature 1 only"):
        head_loss(hidden, head, labels, sampled_targets(teacher, 4), 1.0, 0.0, temperature)
