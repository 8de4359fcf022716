"""Experts beside an adapter: training reaches them, balances them, and refuses what stays idle."""

from pathlib import Path

import pytest
import torch

from modeling.lora import AdapterShape, adapt, trainable
from modeling.moe import ExpertsShape, IdleExpert, add_experts
from stages.learning.finetuning import finetune
from stages.learning.supervision import lay_out
from stages.sft.params import Capability, Experts
from tests.stages.lessons import rows
from tests.stages.test_finetuning import Desk, lesson
from tests.tiny import tiny_mamba

SHAPE = ExpertsShape(after_block=2, experts=2, units=8, temperature=0.7, balance=0.01)


def taught(folder: Path, shape: ExpertsShape = SHAPE, bias: float = 0.0):
    model = tiny_mamba()
    adapted = adapt(model, AdapterShape(2, 4.0, "lora", (), 1), 0, folder)
    experts = add_experts(model, shape, rows(2), seed=0)
    experts.router_bias.data[0] += bias
    desk = Desk(folder)
    finetune(adapted, lesson(steps=4, learning_rate=1e-2), desk, "tools")
    return adapted, experts, desk


def test_all_of_a_mixture_learns_with_the_adapter(tmp_path: Path) -> None:
    adapted, experts, desk = taught(tmp_path)
    assert desk.losses[-1] < desk.losses[0]
    assert all(expert.any() for expert in experts.down)
    fresh = tiny_mamba()
    other = adapt(fresh, AdapterShape(2, 4.0, "lora", (), 1), 0, tmp_path)
    add_experts(fresh, SHAPE, rows(2), seed=0)
    for (name, before), (same, after) in zip(trainable(other), trainable(adapted), strict=True):
        assert name == same
        assert not torch.equal(before, after), name


def test_the_same_seed_gives_the_same_bits(tmp_path: Path) -> None:
    first, again = (taught(tmp_path)[0] for _ in range(2))
    for (_, one), (_, other) in zip(trainable(first), trainable(again), strict=True):
        assert torch.equal(one, other)


def test_a_mixture_with_an_idle_expert_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IdleExpert, match="no gradient reaches expert 1"):
        taught(tmp_path, bias=1000.0)


def test_padding_is_known_by_what_is_counted() -> None:
    examples = lesson().examples[:4]
    for packing in (False, True):
        for laid in lay_out(examples, 0, 64, packing):
            assert laid.real[laid.counted].all()
        total = sum(laid.real.sum() for laid in lay_out(examples, 0, 64, packing))
        assert total == sum(len(example) for example in examples)


def test_what_sft_is_told_of_experts_is_what_the_mixture_takes() -> None:
    assert set(Experts.__annotations__) == set(ExpertsShape.__annotations__)
    with pytest.raises(ValueError, match="'experts' is 1; it must lie between 2 and 64"):
        Capability("tools", ("a",), None, (), 0, Experts(2, 1, 32, 0.7, 0.01))
