"""Skills: an adapter and its experts are written, opened and used together."""

from pathlib import Path

import torch

from modeling.lora import AdapterShape, adapt, trainable
from modeling.moe import ExpertsShape, add_experts, balance_loss, find_experts
from modeling.skills import open_skill, open_skilled, save_skill
from tests.tiny import tiny_llama, tiny_mamba

TOKENS = torch.arange(48).view(2, 24) * 5 % 97
SHAPE = ExpertsShape(after_block=2, experts=2, units=8, temperature=0.7, balance=0.01)


def learnt(tmp_path: Path, experts: bool = True):
    """A Mamba with a skill of two steps, saved, and what it says."""
    model = tiny_mamba()
    adapted = adapt(model, AdapterShape(2, 4.0, "lora", (), 2), 0, tmp_path / "start")
    if experts:
        add_experts(model, SHAPE, TOKENS, seed=0)
    optimizer = torch.optim.SGD([p for _, p in trainable(adapted)], 0.05)
    for _ in range(3):
        loss = adapted(TOKENS, labels=TOKENS, use_cache=False).loss
        (loss + balance_loss(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
    save_skill(adapted, tmp_path / "skill", tmp_path / "start")
    return adapted, adapted(TOKENS).logits


def test_a_skill_opens_on_a_stock_model_without_code(tmp_path: Path) -> None:
    _, said = learnt(tmp_path)
    assert sorted(path.name for path in (tmp_path / "skill").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "experts.json", "experts.safetensors",
    ]  # fmt: skip
    assert torch.equal(open_skill(tiny_mamba(), tmp_path / "skill")(TOKENS).logits, said)
    assert find_experts(tiny_mamba()) is None
    stock = tiny_mamba()
    skilled = open_skilled(stock, tmp_path / "skill")
    torch.testing.assert_close(skilled(TOKENS).logits, said, rtol=1e-4, atol=1e-4)
    assert torch.equal(stock(TOKENS).logits, tiny_mamba()(TOKENS).logits)
    answer = skilled.generate(TOKENS[:1, :5], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert answer.shape == (1, 9)


def test_the_experts_of_a_skill_made_a_difference(tmp_path: Path) -> None:
    _, with_experts = learnt(tmp_path / "with")
    _, without = learnt(tmp_path / "without", experts=False)
    assert not torch.equal(with_experts, without)
    assert not (tmp_path / "without/skill/experts.json").exists()
    reopened = open_skilled(tiny_mamba(), tmp_path / "without/skill")
    assert find_experts(reopened) is None


def test_experts_can_stay_as_they_are_while_the_adapter_goes_on(tmp_path: Path) -> None:
    adapted, _ = learnt(tmp_path)
    folder = tmp_path / "skill"
    going_on = open_skill(tiny_mamba(), folder, trains=True)
    assert [name for name, _ in trainable(going_on)] == [name for name, _ in trainable(adapted)]
    half = open_skill(tiny_mamba(), folder, trains=True, experts_train=False)
    assert all(".lora_" in name for name, _ in trainable(half))
    assert not trainable(open_skill(tiny_mamba(), folder))


def test_other_models_have_skills_with_experts_too(tmp_path: Path) -> None:
    model = tiny_llama()
    adapted = adapt(model, AdapterShape(2, 4.0, "lora"), 0, tmp_path / "start")
    add_experts(model, SHAPE, TOKENS, seed=0).down.data.fill_(0.1)
    save_skill(adapted, tmp_path / "skill", tmp_path / "start")
    reopened = open_skill(tiny_llama(), tmp_path / "skill")
    assert torch.equal(reopened(TOKENS).logits, adapted(TOKENS).logits)
