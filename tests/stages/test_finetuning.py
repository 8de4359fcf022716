"""Training on conversations: it learns, follows from seed and step, and counts what it should."""

from pathlib import Path

import pytest
import torch

from modeling.lora import AdapterShape, adapt, trainable
from stages.learning.course import Course
from stages.learning.finetuning import Lesson, draw, finetune, mean_loss
from stages.measuring.forgetting import Forgetting, Forgot, compare, require_kept, row_losses
from tests.stages.lessons import rows
from tests.stages.test_supervision import example
from tests.tiny import tiny_llama, tiny_mamba

SHAPE = AdapterShape(4, 8.0, "lora")
COURSE = {
    "steps": 30, "batch_conversations": 4, "general_rows": 1, "general_weight": 0.5,
    "most_tokens": 64, "packing": False,
    "learning_rate": 2e-2, "warmup": 0.1, "clip": 1.0, "validation_conversations": 2,
    "validate_every": 10, "spike": 3.0, "regression": 1.0, "forgetting": 0.5, "fast_path": True,
    "seed": 0,
}  # fmt: skip


class Desk:
    """A job without a pipeline: remembers what it is told, never resumes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.losses: list[float] = []
        self.said: list[str] = []

    def resume(self, fresh, _phase):
        return fresh

    def say(self, text: str) -> None:
        self.said.append(text)

    def step_done(self, _state, _step, _total, _phase, **metrics: float) -> None:
        self.losses.append(metrics["loss"])


def lesson(**changes) -> Lesson:
    examples = [example(6 + n % 5, start=n % 7) for n in range(12)]
    return Lesson(Course(**{**COURSE, **changes}), examples[2:], examples[:2], rows(6), 0)


def taught(tmp_path: Path, **changes) -> tuple[list[float], list[torch.Tensor]]:
    adapted = adapt(tiny_llama(), SHAPE, 0, tmp_path)
    desk = Desk(tmp_path)
    finetune(adapted, lesson(**changes), desk, "tools")
    return desk.losses, [p.detach().clone() for _, p in trainable(adapted)]


def test_a_pattern_is_learnt(tmp_path: Path) -> None:
    adapted = adapt(tiny_llama(), SHAPE, 0, tmp_path)
    before = mean_loss(adapted.get_base_model(), lesson(), lesson().validation)
    finetune(adapted, lesson(), Desk(tmp_path), "tools")
    after = mean_loss(adapted.get_base_model(), lesson(), lesson().validation)
    assert after < 0.5 * before


def test_the_same_seed_gives_the_same_bits_and_another_one_does_not(tmp_path: Path) -> None:
    (_, first), (_, again) = taught(tmp_path, steps=3), taught(tmp_path, steps=3)
    _, other = taught(tmp_path, steps=3, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_packed_or_padded_the_same_is_learnt(tmp_path: Path) -> None:
    padded, packed = taught(tmp_path, steps=4), taught(tmp_path, steps=4, packing=True)
    assert padded[0] == pytest.approx(packed[0], rel=1e-3)


def test_rows_are_not_packed_for_a_model_with_a_recurrent_state(tmp_path: Path) -> None:
    adapted = adapt(tiny_mamba(), SHAPE, 0, tmp_path)
    with pytest.raises(ValueError, match="Mamba.* takes no positions: .* packing to false"):
        finetune(adapted, lesson(packing=True), Desk(tmp_path), "tools")


def test_general_text_is_learnt_from_as_much_as_is_asked_for(tmp_path: Path) -> None:
    _, without = taught(tmp_path, steps=2, general_rows=0)
    _, unweighted = taught(tmp_path, steps=2, general_rows=2, general_weight=0.0)
    _, with_text = taught(tmp_path, steps=2, general_rows=2)
    assert all(torch.equal(a, b) for a, b in zip(without, unweighted, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(without, with_text, strict=True))


def test_each_conversation_comes_once_an_epoch_in_a_new_order() -> None:
    order = list(draw(range(12), 4, (0, 0)))
    assert [sorted(order[n : n + 4]) for n in (0, 4, 8)] == [[0, 1, 2, 3]] * 3
    assert order[:4] != order[4:8] or order[4:8] != order[8:]
    assert list(draw(range(5, 9), 4, (0, 0))) == order[5:9]  # wherever it is begun


def test_a_model_that_forgot_too_much_is_refused_with_the_figures() -> None:
    before = torch.full((8,), 2.0)
    forgetting = compare(before, before + 0.1)
    assert forgetting.ratio == pytest.approx(1.105, abs=1e-3)
    require_kept(forgetting, 0.11, "adapter 'tools'")
    with pytest.raises(Forgot, match=r"adapter 'tools': .* x1\.1052 .* at most 1\.03 is allowed"):
        require_kept(forgetting, 0.03, "adapter 'tools'")
    assert compare(before, before) == Forgetting(1.0, 1.0, 1.0)


def test_row_losses_are_the_model_s_own(tmp_path: Path) -> None:
    model, tokens = tiny_llama(), rows(3)
    expected = torch.stack([model(row[None], labels=row[None]).loss for row in tokens])
    torch.testing.assert_close(row_losses(model, tokens, 2), expected)
