"""The loss across tokenizers: plain distillation where they are one, and its gradient is right."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

import modeling.losses
from modeling.aligned_loss import AlignedTargets, aligned_loss
from modeling.aligned_rows import StudentRow, TeacherRow, align_rows
from modeling.alignment import find_candidates
from modeling.answers import Answers
from modeling.losses import head_loss
from modeling.token_bytes import Vocabulary
from tests.modeling.vocabularies import all_texts, longest_match, random_vocabulary

D = 6


def teacher_row(vocabulary: Vocabulary, ids: list[int], logits: Tensor, k: int) -> TeacherRow:
    """What extraction would keep of a row: logits (U, V)."""
    found = Answers.of(logits, k).targets()
    actual = torch.zeros(len(ids))
    log_probs = logits.log_softmax(-1)
    actual[:-1] = log_probs[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
    return TeacherRow(
        np.array(ids), vocabulary.ends(ids), found.ids.numpy(), found.log_probs.numpy(),
        found.tail.numpy(), actual.numpy(),
    )  # fmt: skip


def example(
    teacher: Vocabulary, student: Vocabulary, k: int, rows: int = 3, letters: int = 24
) -> tuple[Tensor, Tensor, Tensor, AlignedTargets, Tensor]:
    """hidden (M, D), head (V, D), labels (M,), targets, and the teacher's logits; float32."""
    generator = np.random.default_rng(1)
    texts = ["".join(generator.choice(list("abc"), letters)).encode() for _ in range(rows)]
    torch.manual_seed(0)
    head = torch.randn(len(student.tokens), D)
    students, teachers, labels, logits = [], [], [], []
    for text in texts:
        ids, known = student.split(text), teacher.split(text)
        students.append(StudentRow(np.array(ids), student.ends(ids)))
        logits.append(torch.randn(len(known), len(teacher.tokens)) * 2)
        teachers.append(teacher_row(teacher, known, logits[-1], k))
        labels.append(torch.tensor(ids[1:]))
    targets, _ = align_rows(find_candidates(teacher, student), students, teachers)
    labels = torch.cat(labels)
    return torch.randn(len(labels), D), head, labels, targets, torch.cat([x[:-1] for x in logits])


def two(seed: int) -> tuple[Vocabulary, Vocabulary]:
    generator = np.random.default_rng(seed)
    return random_vocabulary(generator, 7), random_vocabulary(generator, 5)


def gradient_of(loss_of, hidden: Tensor, *arguments) -> tuple[Tensor, float, float, Tensor]:
    hidden = hidden.detach().requires_grad_()
    loss, kl, ce = loss_of(hidden, *arguments)
    loss.backward()
    return loss.detach(), kl, ce, hidden.grad


# --- one tokenizer on both sides -------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 7, 10])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_with_one_tokenizer_it_is_plain_distillation(k: int, temperature: float) -> None:
    tokens = random_vocabulary(np.random.default_rng(5), 7)
    hidden, head, labels, targets, logits = example(tokens, tokens, k)
    plain = Answers.of(logits, k).targets()
    weights = (0.7, 0.4, temperature)
    wanted = gradient_of(head_loss, hidden, head, labels, plain, *weights)
    found = gradient_of(aligned_loss, hidden, head, labels, targets, *weights)
    for one, other in zip(found[:3], wanted[:3], strict=True):
        assert float(one) == pytest.approx(float(other), rel=1e-5, abs=1e-6)
    floor = 1e-5 if k == len(tokens.tokens) else 1e-6  # an empty tail: head_loss goes on through it
    torch.testing.assert_close(found[3], wanted[3], atol=floor, rtol=1e-4)


def test_a_student_that_numbers_the_same_tokens_differently_is_taught_the_same() -> None:
    tokens = random_vocabulary(np.random.default_rng(5), 7)
    order = torch.randperm(len(tokens.tokens), generator=torch.Generator().manual_seed(3))
    other = longest_match(*(tokens.tokens[n].decode() for n in order))
    hidden, head, labels, targets, _ = example(tokens, tokens, 4)
    _, _, new_labels, renumbered, _ = example(tokens, other, 4)
    assert torch.equal(order[new_labels], labels)
    wanted = gradient_of(aligned_loss, hidden, head, labels, targets, 1.0, 0.3, 1.0)
    found = gradient_of(aligned_loss, hidden, head[order], new_labels, renumbered, 1.0, 0.3, 1.0)
    for one, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, expected, atol=1e-6, rtol=1e-4)


# --- two tokenizers --------------------------------------------------------------------------


def naive_kl(log_probs: Tensor, labels: Tensor, targets: AlignedTargets) -> Tensor:
    """KL at temperature 1, part by part, in float64; log_probs (M, V) the student's."""
    total = torch.zeros((), dtype=torch.float64)
    for n, position in enumerate(targets.positions.tolist()):
        wanted = targets.log_masses[n].double().exp()
        wanted = wanted / wanted.sum()
        p = log_probs[position].exp()
        found, left = [], 1.0
        for bucket in range(len(wanted) - 2):
            listed = targets.ids[n][(targets.ids[n] >= 0) & (targets.groups[n] == bucket)]
            found.append(p[listed].sum())
            left = left - found[-1]
        inside = [i for i, owner in enumerate(targets.span_of.tolist()) if owner == n]
        span = torch.ones(()).double() if wanted[-2] > 0 else torch.zeros(()).double()
        for i in inside if wanted[-2] > 0 else []:
            span = span * log_probs[i, labels[i]].exp()
        for t, q in zip(wanted, [*found, span, left - span], strict=True):
            if t > 0:
                total = total + t * (t / q).log()
    return total / len(targets.positions)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("k", [2, 5])
def test_value_and_gradient_equal_a_computation_part_by_part(seed: int, k: int) -> None:
    hidden, head, labels, targets, _ = example(*two(seed), k)
    assert (targets.log_masses[:, -2] > -1000).any()  # there are spans
    reference = hidden.double().requires_grad_()
    log_probs = (reference @ head.double().T).log_softmax(-1)
    kl = naive_kl(log_probs, labels, targets)
    ce = -log_probs.gather(-1, labels[:, None]).mean()
    (0.7 * kl + 0.4 * ce).backward()
    _, found_kl, found_ce, gradient = gradient_of(
        aligned_loss, hidden, head, labels, targets, 0.7, 0.4, 1.0
    )
    assert found_kl == pytest.approx(kl.item(), rel=1e-4)
    assert found_ce == pytest.approx(ce.item(), rel=1e-5)
    torch.testing.assert_close(gradient.double(), reference.grad, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_gradient_passes_gradcheck(temperature: float) -> None:
    hidden, head, labels, targets, _ = example(*two(2), 4, rows=2, letters=10)
    hidden, head = hidden.double().requires_grad_(), head.double().requires_grad_()

    def loss(h: Tensor, w: Tensor) -> Tensor:
        return aligned_loss(h, w, labels, targets, 0.7, 0.4, temperature)[0]

    assert gradcheck(loss, (hidden, head))


@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    arguments = (*example(*two(2), 4)[:4], 0.7, 0.4, 2.0)
    expected = gradient_of(aligned_loss, *arguments)
    monkeypatch.setattr(modeling.losses, "CHUNK_TOKENS", chunk)
    for found, wanted in zip(gradient_of(aligned_loss, *arguments), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_a_student_who_knows_the_texts_has_no_divergence_where_tokens_are_single(seed: int) -> None:
    """Both read one distribution of texts, in their own tokens; all is stored."""
    teacher, student = two(seed)
    generator = np.random.default_rng(seed)
    texts = all_texts(7)
    chances = generator.dirichlet(np.full(len(texts), 0.3))

    def following(vocabulary: Vocabulary, ids: list[int]) -> np.ndarray:
        masses = np.full(len(vocabulary.tokens), 1e-12)
        for text, chance in zip(texts, chances, strict=True):
            split = vocabulary.split(text)
            if split[: len(ids)] == ids and len(split) > len(ids):
                masses[split[len(ids)]] += chance
        return masses / masses.sum()

    known = torch.tensor(following(teacher, [])).log()[None]
    log_q = torch.tensor(following(student, [])).log()[None]
    token = next(n for n, piece in enumerate(teacher.tokens) if piece in student.tokens)
    own = student.tokens.index(teacher.tokens[token])
    stored = Answers.of(known.float(), len(teacher.tokens)).targets()
    both = np.array([token, token])
    row = TeacherRow(
        both, np.array([1, 1 + len(teacher.tokens[token])]),
        *(np.repeat(part.numpy(), 2, 0) for part in (stored.ids, stored.log_probs, stored.tail)),
        np.zeros(2),
    )  # fmt: skip
    pair = StudentRow(np.array([own, own]), row.ends)
    targets, _ = align_rows(find_candidates(teacher, student), [pair], [row])
    eye = torch.eye(len(student.tokens))
    _, kl, _, gradient = gradient_of(
        aligned_loss, log_q.float(), eye, torch.tensor([own]), targets, 1.0, 0.0, 1.0
    )
    assert kl == pytest.approx(0.0, abs=1e-5)
    assert gradient.abs().max() < 1e-4


def test_the_divergence_is_never_negative_and_a_step_lowers_it() -> None:
    for seed in range(6):
        hidden, head, labels, targets, _ = example(*two(seed), 3)
        arguments = (head, labels, targets, 1.0, 0.0, 1.0)
        loss, kl, _, gradient = gradient_of(aligned_loss, hidden, *arguments)
        assert kl >= 0
        assert gradient_of(aligned_loss, hidden - gradient, *arguments)[0] < loss


def test_a_batch_without_a_common_boundary_is_refused() -> None:
    teacher, student = longest_match("a", "b", "ab"), longest_match("a", "b")
    row = TeacherRow(
        np.array([2]), np.array([2]), np.array([[0]]), np.zeros((1, 1)), np.array([0.5]),
        np.zeros(1),
    )  # fmt: skip
    pair = StudentRow(np.array([0, 1]), np.array([1, 2]))
    targets, _ = align_rows(find_candidates(teacher, student), [pair], [row])
    with pytest.raises(ValueError, match="no common boundary"):
        aligned_loss(torch.zeros(1, D), torch.zeros(2, D), torch.tensor([1]), targets, 1, 0, 1)
