"""Mixtures of targets: each term is its formula, no token twice, and the gradient of the sum."""

import pytest
import torch
from torch import Tensor

from modeling.losses import SampledTargets, SparseTargets, head_loss
from modeling.mixture import mix_targets

VOCABULARY, POSITIONS = 30, 6


def distribution(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(POSITIONS, VOCABULARY, generator=generator)).softmax(-1)


def top(probs: Tensor, kept: int) -> SparseTargets:
    values, ids = probs.topk(kept, -1)
    return SparseTargets(ids, values.log(), 1 - values.sum(-1))


def draws(seed: int, count: int = 8) -> SampledTargets:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (POSITIONS, count), generator=generator)
    return SampledTargets(ids, torch.full(ids.shape, 1 / count), -torch.rand(POSITIONS))


def head_gradient(answers: list, weights: list[float]) -> tuple[float, Tensor]:
    """The weighted sum of the distillation losses, and its gradient by the states."""
    generator = torch.Generator().manual_seed(9)
    hidden = torch.randn(POSITIONS, 8, generator=generator).requires_grad_(True)
    head = torch.randn(VOCABULARY, 8, generator=generator)
    labels = torch.zeros(POSITIONS, dtype=torch.int64)
    total = sum(
        weight * head_loss(hidden, head, labels, one, 1.0, 0.0, 1.0)[0]
        for one, weight in zip(answers, weights, strict=True)
    )
    total.backward()
    return total.item(), hidden.grad


def test_one_teachers_targets_are_given_as_they_are() -> None:
    one = top(distribution(0), 5)
    assert mix_targets([one], [3.0]) is one


@pytest.mark.parametrize("weights", [[1.0, 1.0], [3.0, 1.0], [1.0, 0.0]])
def test_with_all_tokens_kept_the_mixture_is_the_weighted_mean(weights: list[float]) -> None:
    probs = [distribution(seed) for seed in (0, 1)]
    mixed = mix_targets([top(p, VOCABULARY) for p in probs], weights)
    found = torch.zeros(POSITIONS, VOCABULARY).scatter(-1, mixed.ids, mixed.log_probs.exp())
    shares = [weight / sum(weights) for weight in weights]
    torch.testing.assert_close(found, shares[0] * probs[0] + shares[1] * probs[1])
    torch.testing.assert_close(mixed.tail, torch.zeros(POSITIONS), atol=1e-6, rtol=0)


def test_the_gradient_is_that_of_the_weighted_sum_of_losses() -> None:
    answers = [top(distribution(seed), VOCABULARY) for seed in (0, 1, 2)]
    _, apart = head_gradient(answers, [0.5, 0.3, 0.2])
    _, mixed = head_gradient([mix_targets(answers, [5.0, 3.0, 2.0])], [1.0])
    torch.testing.assert_close(mixed, apart, atol=1e-6, rtol=1e-4)


def test_draws_are_mixed_exactly_loss_and_gradient() -> None:
    answers = [draws(0), draws(1, 5)]
    loss, apart = head_gradient(answers, [0.75, 0.25])
    same, mixed = head_gradient([mix_targets(answers, [3.0, 1.0])], [1.0])
    assert same == pytest.approx(loss, abs=1e-5)
    torch.testing.assert_close(mixed, apart, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("seeds", [(0, 0), (0, 1), (0, 1, 2)])
def test_no_token_is_named_twice_and_the_mass_is_one(seeds: tuple[int, ...]) -> None:
    mixed = mix_targets([top(distribution(seed), 6) for seed in seeds], [1.0] * len(seeds))
    assert mixed.ids.shape == (POSITIONS, 6)
    assert all(len(set(row)) == 6 for row in mixed.ids.tolist())
    torch.testing.assert_close(mixed.log_probs.exp().sum(-1) + mixed.tail, torch.ones(POSITIONS))


def test_twice_the_same_teacher_is_that_teacher() -> None:
    one = top(distribution(0), 6)
    mixed = mix_targets([one, one], [0.2, 0.8])
    torch.testing.assert_close(mixed.log_probs, one.log_probs)
    assert torch.equal(mixed.ids, one.ids)


def test_tops_of_different_lengths_leave_the_longer_one() -> None:
    mixed = mix_targets([top(distribution(0), 4), top(distribution(1), 9)], [1.0, 1.0])
    assert mixed.ids.shape == (POSITIONS, 9)
    assert all(len(set(row)) == 9 for row in mixed.ids.tolist())


def test_shapes_with_rows_are_mixed_as_flat_ones() -> None:
    flat = [top(distribution(seed), 6) for seed in (0, 1)]
    rows = [one.each(lambda t: t.view(2, 3, *t.shape[1:])) for one in flat]
    mixed = mix_targets(rows, [1.0, 2.0]).each(lambda t: t.flatten(0, 1))
    expected = mix_targets(flat, [1.0, 2.0])
    assert torch.equal(mixed.ids, expected.ids) and torch.equal(mixed.tail, expected.tail)


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [0.0, 0.0]])
def test_weights_that_make_no_mixture_are_refused(weights: list[float]) -> None:
    one = top(distribution(0), 5)
    with pytest.raises(ValueError, match="one weight a teacher"):
        mix_targets([one, one], weights)


def test_a_top_and_draws_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be mixed"):
        mix_targets([top(distribution(0), 5), draws(0)], [1.0, 1.0])
