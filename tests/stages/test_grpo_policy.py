"""GRPO's update on a tiny model: its gradient, what it leaves alone, and that rewards are heard."""

from pathlib import Path

import pytest
import torch

from modeling.lora import AdapterShape, adapt, keep_reference, save_adapter, trainable
from stages.grpo.policy import Policy, Trace, accumulate, look_back
from stages.learning.supervision import Example
from tests.tiny import tiny_llama

CLIP, BETA, MOST_OWN = 0.2, 0.1, 8


def trace(length: int, advantage: float, start: int = 0) -> Trace:
    """A prompt of three tokens, own ones, two that a tool put in, and own ones again."""
    tokens = tuple((start + 7 * n) % 97 for n in range(length))
    counted = tuple(n >= 3 and n not in (5, 6) for n in range(length))
    return Trace(Example(tokens, counted), advantage)


def traces() -> list[Trace]:
    return [trace(9, 1.0), trace(12, -0.5, 3), trace(7, 0.7, 11), trace(12, -1.2, 40)]


@pytest.fixture(params=[False, True], ids=["padded", "shared"])
def policy(request: pytest.FixtureRequest, tmp_path: Path) -> Policy:
    adapted = adapt(tiny_llama(), AdapterShape(4, 8.0, "lora"), 0, tmp_path / "start")
    for name, parameter in trainable(adapted):  # no longer nothing
        if "lora_B" in name:
            parameter.data.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    save_adapter(adapted, tmp_path / "adapter", tmp_path / "start")
    keep_reference(adapted, tmp_path / "adapter")
    return Policy(adapted, 0, 24, 0.7, request.param)


def gradients(policy: Policy) -> list[torch.Tensor]:
    found = [p.grad.clone() for _, p in trainable(policy.adapted)]
    policy.adapted.zero_grad()
    return found


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo"])
def test_the_gradient_is_that_of_a_dense_computation(policy: Policy, loss: str) -> None:
    given = traces()
    look_back(policy, given, BETA)
    seen = accumulate(policy, given, loss, CLIP, BETA, MOST_OWN)
    ours = gradients(policy)
    total = 0.0
    own = sum(t.own for t in given)
    for t in given:
        tokens = torch.tensor([t.example.tokens])
        logits = policy.model(tokens).logits[0, :-1] / policy.temperature
        chosen = logits.log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0]
        new = chosen[torch.tensor(t.example.counted[1:])]
        weight = {
            "grpo": 1 / (len(given) * t.own),
            "dr_grpo": 1 / (len(given) * MOST_OWN),
            "dapo": 1 / own,
        }
        apart = t.reference - new
        kl = apart.exp() - apart - 1
        ratio = (new - new.detach()).exp()
        total = total + (ratio * (BETA * kl - t.advantage) * weight[loss]).sum()
    total.backward()
    assert seen["loss"] == pytest.approx(total.item(), rel=1e-4, abs=1e-6)
    for a, b in zip(ours, gradients(policy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_at_its_reference_a_policy_has_no_distance_from_it(policy: Policy) -> None:
    given = traces()
    look_back(policy, given, BETA)
    assert accumulate(policy, given, "grpo", CLIP, BETA, MOST_OWN)["kl"] == pytest.approx(
        0, abs=1e-6
    )


def test_looking_back_leaves_the_policy_as_it_was(policy: Policy) -> None:
    before = [name for name, _ in trainable(policy.adapted)]
    look_back(policy, traces(), BETA)
    assert [name for name, _ in trainable(policy.adapted)] == before
    assert not any("reference" in name for name in before)


def test_what_a_tool_put_in_is_read_but_not_learnt(policy: Policy) -> None:
    """Its own probability does not count; what is written behind it depends on it."""
    given = [trace(9, 1.0)]
    silent = Trace(Example(given[0].example.tokens, (False,) * 7 + (True, True)), 1.0)
    with_all, _ = policy.log_probs(given)
    behind, _ = policy.log_probs([silent])
    torch.testing.assert_close(with_all[-2:], behind)
    changed = list(given[0].example.tokens)
    changed[5] = 90
    other, _ = policy.log_probs([Trace(Example(tuple(changed), given[0].example.counted), 1.0)])
    assert not torch.allclose(other[-2:], with_all[-2:])
    torch.testing.assert_close(other[:2], with_all[:2])


def test_rewarded_answers_become_more_likely_and_punished_ones_less(policy: Policy) -> None:
    optimizer = torch.optim.SGD([p for _, p in trainable(policy.adapted)], 0.1)
    given = traces()
    before = [policy.log_probs([t])[0].sum().item() for t in given]
    for _ in range(5):
        accumulate(policy, traces(), "grpo", CLIP, 0.0, MOST_OWN)
        optimizer.step()
        optimizer.zero_grad()
    after = [policy.log_probs([t])[0].sum().item() for t in given]
    for t, was, now in zip(given, before, after, strict=True):
        assert (now > was) == (t.advantage > 0)
