"""Losses: values and gradients equal a dense float64 computation of the formulas."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import modeling.losses
from modeling.answers import Answers
from modeling.losses import SparseTargets, TeacherView, head_loss

N, D, V = 11, 8, 29


def sparse_targets(logits: Tensor, k: int) -> SparseTargets:
    """Targets as `extract` makes them."""
    return Answers.of(logits, k).targets()


def example(k: int, seed: int = 0, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden (N, D), head (V, D), labels (N,) and a teacher's logits (N, V), float64."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=generator, dtype=torch.float64)
    head = torch.randn(V, D, generator=generator, dtype=torch.float64) * scale
    teacher = torch.randn(N, V, generator=generator, dtype=torch.float64) * 2 * scale
    labels = torch.randint(V, (N,), generator=generator)
    labels[0] = teacher[0].argmax()  # one label surely among the top-k, and
    labels[1] = teacher[1].argmin()  # one surely not, unless k is V
    return hidden, head, labels, teacher


def dense_loss(
    hidden: Tensor, head: Tensor, labels: Tensor, teacher: Tensor, k: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """T^2 KL over k + 1 buckets, and CE, by autograd over the whole vocabulary."""
    student = (hidden @ head.T).log_softmax(-1)
    ids = teacher.topk(k, -1).indices

    def buckets(log_probs: Tensor) -> Tensor:
        rest = log_probs.scatter(-1, ids, float("-inf")).logsumexp(-1, keepdim=True)
        return torch.cat([log_probs.gather(-1, ids), rest], -1)

    q = (buckets(student) / temperature).log_softmax(-1)
    t = (buckets(teacher.log_softmax(-1)) / temperature).log_softmax(-1)
    kl = (t.exp() * (t - q)).sum(-1).mean() * temperature**2
    return kl, cross_entropy(hidden @ head.T, labels)


def gradient_of(hidden: Tensor, *arguments) -> tuple[Tensor, float, float, Tensor]:
    """Loss, KL, CE of head_loss and the gradient of its loss by `hidden`."""
    hidden = hidden.detach().requires_grad_()
    loss, kl, ce = head_loss(hidden, *arguments)
    loss.backward()
    return loss.detach(), kl, ce, hidden.grad


# --- head_loss -------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 4, 512])
def test_a_head_that_is_trained_gets_the_gradient_of_a_dense_computation(
    monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(modeling.losses, "CHUNK_TOKENS", chunk)
    hidden, head, labels, teacher = example(8)
    learnt, dense = head.clone().requires_grad_(), head.clone().requires_grad_()
    targets = sparse_targets(teacher, 8)
    (3 * head_loss(hidden, learnt, labels, targets, 0.7, 0.3, 2.0)[0]).backward()
    kl, ce = dense_loss(hidden, dense, labels, teacher, 8, 2.0)
    (3 * (0.7 * kl + 0.3 * ce)).backward()
    torch.testing.assert_close(learnt.grad, dense.grad, atol=1e-5, rtol=1e-4)


def test_without_gradients_none_is_computed_for_a_head_that_is_trained() -> None:
    hidden, head, labels, teacher = example(8)
    with torch.no_grad():
        loss, *_ = head_loss(
            hidden, head.requires_grad_(), labels, sparse_targets(teacher, 8), 1.0, 0.0, 1.0
        )
    assert not loss.requires_grad


@pytest.mark.parametrize("k", [1, 2, 8, V - 2, V - 1])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("kd_weight", "ce_weight"), [(1.0, 0.0), (0.0, 1.0), (0.7, 0.4)])
def test_value_and_gradient_equal_a_dense_computation(
    k: int, temperature: float, kd_weight: float, ce_weight: float
) -> None:
    hidden, head, labels, teacher = example(k)
    reference = hidden.clone().requires_grad_()
    kl, ce = dense_loss(reference, head, labels, teacher, k, temperature)
    (kd_weight * kl + ce_weight * ce).backward()

    single = (part.float() for part in (hidden, head))
    loss, found_kl, found_ce, gradient = gradient_of(
        *single, labels, sparse_targets(teacher, k), kd_weight, ce_weight, temperature
    )
    assert found_kl == pytest.approx(kl.item(), rel=1e-4, abs=1e-6)
    assert found_ce == pytest.approx(ce.item(), rel=1e-5)
    assert loss.item() == pytest.approx(kd_weight * found_kl + ce_weight * found_ce, rel=1e-5)
    torch.testing.assert_close(gradient.double(), reference.grad, atol=2e-6, rtol=1e-3)


def test_the_gradient_equals_finite_differences_of_the_value() -> None:
    hidden, head, labels, teacher = example(k=5)
    targets = sparse_targets(teacher, 5)
    _, _, _, gradient = gradient_of(hidden, head, labels, targets, 0.7, 0.4, 2.0)
    for number in range(4):
        direction = torch.randn(N, D, dtype=torch.float64) * 1e-2
        above, below = (
            dense_loss(hidden + sign * direction, head, labels, teacher, 5, 2.0) for sign in (1, -1)
        )
        expected = (0.7 * (above[0] - below[0]) + 0.4 * (above[1] - below[1])) / 2
        found = (gradient * direction).sum()
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-2, msg=str(number))


@pytest.mark.parametrize("chunk", [1, 3, N, 1000])
def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    hidden, head, labels, teacher = (
        part.float() if part.is_floating_point() else part for part in example(k=6)
    )
    arguments = (hidden, head, labels, sparse_targets(teacher, 6), 0.7, 0.4, 2.0)
    monkeypatch.setattr(modeling.losses, "CHUNK_TOKENS", 4)
    expected = gradient_of(*arguments)
    monkeypatch.setattr(modeling.losses, "CHUNK_TOKENS", chunk)
    for found, wanted in zip(gradient_of(*arguments), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("k", [1, 4, V - 1])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_a_model_has_no_divergence_from_itself_and_no_gradient(k: int, temperature: float) -> None:
    hidden, head, labels, _ = example(k)
    hidden, head = hidden.float(), head.float()
    targets = sparse_targets(hidden @ head.T, k)
    loss, kl, _, gradient = gradient_of(hidden, head, labels, targets, 1.0, 0.0, temperature)
    assert loss.item() == pytest.approx(0.0, abs=1e-5)
    assert kl == pytest.approx(0.0, abs=1e-5)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-5, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_a_very_sure_model_has_no_divergence_from_itself(temperature: float) -> None:
    hidden, head, labels, _ = example(4, scale=8.0)  # tails down to 1e-20
    hidden, head = hidden.float(), head.float()
    targets = sparse_targets(hidden @ head.T, 4)
    _, kl, _, gradient = gradient_of(hidden, head, labels, targets, 1.0, 0.0, temperature)
    assert kl == pytest.approx(0.0, abs=1e-4)
    assert gradient.abs().max() < 1e-3


def test_the_divergence_is_never_negative() -> None:
    for seed in range(20):
        hidden, head, labels, teacher = example(4, seed, scale=3.0)
        targets = sparse_targets(teacher, 4)
        for temperature in (1.0, 3.0):
            _, kl, _ = head_loss(hidden, head, labels, targets, 1.0, 0.0, temperature)
            assert kl >= -1e-6


def test_the_loss_passes_on_what_follows_it() -> None:
    hidden, head, labels, teacher = example(4)
    arguments = (head, labels, sparse_targets(teacher, 4), 0.7, 0.4, 2.0)
    *_, plain = gradient_of(hidden, *arguments)
    scaled = hidden.clone().requires_grad_()
    (3 * head_loss(scaled, *arguments)[0]).backward()
    torch.testing.assert_close(scaled.grad, 3 * plain)


def test_inputs_are_left_as_they_are() -> None:
    hidden, head, labels, teacher = (
        part.float() if part.is_floating_point() else part for part in example(k=6)
    )
    targets = sparse_targets(teacher, 6)
    parts = (hidden, head, labels, targets.ids, targets.log_probs, targets.tail)
    before = [part.clone() for part in parts]
    gradient_of(hidden, head, labels, targets, 0.7, 0.4, 2.0)
    assert all(map(torch.equal, parts, before))


def test_bfloat16_comes_close_to_float64() -> None:
    hidden, head, labels, teacher = example(4)
    hidden, head = hidden.bfloat16(), head.bfloat16()
    reference = hidden.double().requires_grad_()
    kl, ce = dense_loss(reference, head.double(), labels, teacher, 4, 2.0)
    (kl + ce).backward()
    _, found_kl, found_ce, gradient = gradient_of(
        hidden, head, labels, sparse_targets(teacher, 4), 1.0, 1.0, 2.0
    )
    assert gradient.dtype == torch.bfloat16
    assert found_kl == pytest.approx(kl.item(), rel=0.05)
    assert found_ce == pytest.approx(ce.item(), rel=0.05)
    similarity = torch.cosine_similarity(gradient.double().flatten(), reference.grad.flatten(), 0)
    assert similarity > 0.999


def test_a_step_against_the_gradient_lowers_the_loss() -> None:
    hidden, head, labels, teacher = example(4)
    arguments = (head, labels, sparse_targets(teacher, 4), 1.0, 0.5, 2.0)
    losses = []
    for _ in range(50):
        loss, _, _, gradient = gradient_of(hidden, *arguments)
        losses.append(loss.item())
        hidden = hidden - 0.5 * gradient
    assert losses[-1] < 0.8 * losses[0]


# --- sparse_targets --------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 5, V - 1, V])
@pytest.mark.parametrize("scale", [0.1, 1.0, 20.0])
def test_the_masses_of_sparse_targets_sum_to_one(k: int, scale: float) -> None:
    logits = torch.randn(N, V) * scale
    targets = sparse_targets(logits, k)
    total = targets.log_probs.exp().sum(-1) + targets.tail
    torch.testing.assert_close(total, torch.ones(N), atol=1e-5, rtol=0)
    assert (targets.tail >= 0).all()


def test_sparse_targets_are_the_most_likely_tokens_in_order() -> None:
    logits = torch.randn(N, V)
    targets = sparse_targets(logits, 5)
    order = logits.argsort(-1, descending=True)
    assert torch.equal(targets.ids, order[:, :5])
    log_probs = logits.log_softmax(-1)
    torch.testing.assert_close(targets.log_probs, log_probs.gather(-1, targets.ids))
    rest = log_probs.gather(-1, order[:, 5:]).exp().sum(-1)
    torch.testing.assert_close(targets.tail, rest, atol=1e-6, rtol=1e-5)


def test_a_small_tail_is_as_exact_as_a_large_one() -> None:
    logits = torch.randn(N, V) * 6
    targets = sparse_targets(logits, 6)
    exact = logits.double().log_softmax(-1).scatter(-1, targets.ids, float("-inf")).logsumexp(-1)
    assert exact.min() < -12 and exact.max() > -6  # masses around and above float32's precision
    close = exact > -16
    torch.testing.assert_close(
        targets.tail.double().log()[close], exact[close], atol=0.05, rtol=0
    )  # fmt: skip


def test_a_part_of_the_targets_is_that_of_each_tensor() -> None:
    targets = SparseTargets(torch.arange(12).view(6, 2), torch.randn(6, 2), torch.rand(6))
    part = targets[slice(2, 5)]
    assert torch.equal(part.ids, targets.ids[2:5])
    assert torch.equal(part.log_probs, targets.log_probs[2:5])
    assert torch.equal(part.tail, targets.tail[2:5])


# --- TeacherView -----------------------------------------------------------------------------


def test_scores_equal_naive_ones() -> None:
    teacher, student = torch.randn(N, V) * 3, torch.randn(N, V)
    labels = torch.randint(V, (N,))
    kl, ce, agree = TeacherView.of(teacher).scores(student, labels)
    for n in range(N):
        p, q = teacher[n].double().softmax(-1), student[n].double().softmax(-1)
        assert kl[n].item() == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-4)
        assert ce[n].item() == pytest.approx(-q[labels[n]].log().item(), rel=1e-4)
        assert agree[n].item() == float(teacher[n].argmax() == student[n].argmax())


def test_a_model_agrees_with_itself() -> None:
    logits = torch.randn(N, V)
    kl, _, agree = TeacherView.of(logits).scores(logits, torch.zeros(N, dtype=torch.long))
    assert kl.abs().max() < 1e-6 and torch.equal(agree, torch.ones(N))
