"""GRPO's formulas: what must hold of them whatever the numbers are."""

import pytest
import torch

from stages.grpo.objective import LOSSES, advantages, k3, token_losses, token_weights

REWARDS = torch.tensor([[0.0, 1.0, 1.0, 0.2], [0.5, 0.5, 0.5, 0.5]])


@pytest.mark.parametrize("loss", LOSSES)
def test_the_advantages_of_a_group_sum_to_nothing(loss: str) -> None:
    found = advantages(REWARDS, loss)
    torch.testing.assert_close(found.sum(-1), torch.zeros(2))
    assert (found[1] == 0).all()  # equal rewards teach nothing
    assert found[0].argmax() == 1


def test_scaled_advantages_do_not_depend_on_the_unit_of_reward_and_dr_grpo_s_do() -> None:
    torch.testing.assert_close(
        advantages(REWARDS[:1], "grpo"), advantages(REWARDS[:1] * 10, "grpo"), rtol=1e-3, atol=1e-3
    )
    torch.testing.assert_close(
        advantages(REWARDS * 10, "dr_grpo"), 10 * advantages(REWARDS, "dr_grpo")
    )


def test_weights_count_answers_or_tokens_alike() -> None:
    lengths = torch.tensor([2, 6])
    assert (token_weights(lengths, 10, "grpo") * lengths).tolist() == pytest.approx([0.5, 0.5])
    assert token_weights(lengths, 10, "dr_grpo").tolist() == pytest.approx([0.05, 0.05])
    assert token_weights(lengths, 10, "dapo").tolist() == pytest.approx([0.125, 0.125])
    assert torch.isfinite(token_weights(torch.tensor([0]), 10, "grpo")).all()


def test_the_first_gradient_is_that_of_the_policy_gradient() -> None:
    new = torch.tensor([-1.0, -2.0], requires_grad=True)
    advantage = torch.tensor([0.5, -1.5])
    token_losses(new, new.detach(), new.detach(), advantage, 0.2, 0.1).sum().backward()
    torch.testing.assert_close(new.grad, -advantage)


def test_a_step_that_has_gone_far_enough_is_clipped_in_its_own_direction_only() -> None:
    old, advantage = torch.zeros(4), torch.tensor([1.0, -1.0, 1.0, -1.0])
    new = torch.tensor([0.5, -0.5, -0.5, 0.5], requires_grad=True)  # e^.5 = 1.65, e^-.5 = 0.61
    token_losses(new, old, new.detach(), advantage, 0.2, 0.0).sum().backward()
    assert new.grad[:2].tolist() == [0.0, 0.0]  # already better than needed: clipped
    assert (new.grad[2:] != 0).all()  # wrong way round: to be mended in full


def test_k3_is_zero_at_the_reference_never_negative_and_right_on_average() -> None:
    logits = torch.tensor([[1.0, 0.2, -0.7]])
    other = torch.tensor([[0.1, 0.4, 0.3]])
    p, q = logits.log_softmax(-1)[0], other.log_softmax(-1)[0]
    assert (k3(p, p) == 0).all()
    assert (k3(p, q) >= 0).all()
    torch.testing.assert_close((p.exp() * k3(p, q)).sum(), (p.exp() * (p - q)).sum())


def test_the_gradient_of_the_distance_is_right_on_average() -> None:
    """Of KL(policy || reference), at a policy that is no longer the one that wrote."""
    reference, written_by = torch.tensor([0.1, 0.4, 0.3]), torch.tensor([0.5, -0.3, 0.2])
    logits = torch.tensor([1.0, 0.2, -0.7], requires_grad=True)
    p, q, old = logits.log_softmax(-1), reference.log_softmax(-1), written_by.log_softmax(-1)
    losses = token_losses(p, old, q, torch.zeros(3), 0.2, 1.0)
    estimated = torch.autograd.grad((old.exp() * losses).sum(), logits, retain_graph=True)[0]
    exact = torch.autograd.grad((p.exp() * (p - q)).sum(), logits)[0]
    torch.testing.assert_close(estimated, exact)
