"""Adapters: they start as nothing, learn everywhere, come back to the same, and leave no trace."""

from pathlib import Path

import pytest
import torch
from torch import nn

from modeling.lora import (
    VARIANTS,
    AdapterShape,
    DeadAdapter,
    adapt,
    check_learning,
    linear_layers,
    merged,
    open_adapted,
    open_merged,
    save_adapter,
    trainable,
)
from tests.tiny import tiny_gpt2, tiny_llama, tiny_mamba

TOKENS = torch.arange(18).view(2, 9) * 5 % 97
EVERYWHERE = AdapterShape(rank=4, alpha=8.0, variant="lora")


def learn(adapted, steps: int = 2) -> None:
    """A few steps that change what the model says."""
    optimizer = torch.optim.SGD([p for _, p in trainable(adapted)], 0.05)
    for _ in range(steps):
        adapted(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("make", [tiny_llama, tiny_mamba])
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_adapter_starts_as_nothing_and_comes_back_as_it_was_saved(
    variant: str, make, tmp_path: Path
) -> None:
    model, shape = make(), AdapterShape(4, 8.0, variant)
    before = model(TOKENS).logits
    adapted = adapt(model, shape, 0, tmp_path / "start")
    torch.testing.assert_close(adapted(TOKENS).logits, before, rtol=1e-4, atol=1e-4)
    learn(adapted)
    after = adapted(TOKENS).logits
    assert (after - before).abs().max() > 0.01
    save_adapter(adapted, tmp_path / "adapter", tmp_path / "start")
    reopened = open_merged(make(), tmp_path / "adapter")
    torch.testing.assert_close(reopened(TOKENS).logits, after, rtol=1e-4, atol=1e-4)
    assert type(reopened) is type(make())


def test_what_is_saved_names_no_folder_of_this_machine(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    save_adapter(adapt(tiny_llama(), EVERYWHERE, 0, tmp_path / "start"), folder, tmp_path / "start")
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert "/" not in (folder / "adapter_config.json").read_text(encoding="utf-8")


def test_the_seed_alone_decides_how_an_adapter_starts(tmp_path: Path) -> None:
    def start(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(torch.seed() % 1000)
        adapted = adapt(tiny_llama(), EVERYWHERE, seed, tmp_path)
        return [p.detach() for _, p in trainable(adapted)]

    first, again, other = start(1), start(1), start(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_merged_model_says_the_same_and_is_taken_apart_to_the_bit(tmp_path: Path) -> None:
    adapted = adapt(tiny_llama(), EVERYWHERE, 0, tmp_path)
    learn(adapted)
    before = adapted(TOKENS).logits
    with merged(adapted) as model:
        torch.testing.assert_close(model(TOKENS).logits, before, rtol=1e-4, atol=1e-4)
    assert torch.equal(adapted(TOKENS).logits, before)


def test_mamba_carries_adapters_only_where_they_are_called() -> None:
    kinds = {name.rpartition(".")[2] for name in linear_layers(tiny_mamba())}
    assert kinds == {"in_proj", "x_proj"}  # dt_proj's weight is used as a bare matrix


def test_only_the_last_blocks_are_adapted_when_asked(tmp_path: Path) -> None:
    shape = AdapterShape(2, 2.0, "lora", ("q_proj", "down_proj"), last_blocks=1)
    names = [name for name, _ in trainable(adapt(tiny_llama(blocks=3), shape, 0, tmp_path))]
    assert len(names) == 4
    assert all(".layers.2." in name for name in names)


def test_targets_that_a_model_lacks_are_refused_and_those_it_has_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"on c_attn, wq; LlamaForCausalLM has down_proj, gate"):
        adapt(tiny_llama(), AdapterShape(2, 2.0, "lora", ("wq", "c_attn")), 0, tmp_path)
    with pytest.raises(ValueError, match="'last_blocks' is 9, but LlamaForCausalLM has 3"):
        adapt(tiny_llama(), AdapterShape(2, 2.0, "lora", (), 9), 0, tmp_path)


def test_adapters_without_a_gradient_are_refused_by_name(tmp_path: Path) -> None:
    adapted = adapt(tiny_llama(), EVERYWHERE, 0, tmp_path)
    adapted(TOKENS, labels=TOKENS).loss.backward()
    check_learning(trainable(adapted))  # all learn
    dead = adapted.get_base_model().model.layers[1].self_attn.v_proj
    for parameter in dead.parameters():
        parameter.grad = None
    with pytest.raises(DeadAdapter, match=r"1 of 21 .*layers\.1\.self_attn\.v_proj"):
        check_learning(trainable(adapted))


def test_mamba_adapters_on_a_bare_matrix_would_be_found_dead() -> None:
    """What check_learning is for: PEFT itself puts an adapter on dt_proj without a word."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["dt_proj", "x_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(tiny_mamba(), config)
    adapted(TOKENS, labels=TOKENS).loss.backward()
    with pytest.raises(DeadAdapter, match="3 of 6 adapted layers"):
        check_learning(trainable(adapted))


def test_an_adapter_opened_to_go_on_is_trainable_and_one_to_use_is_not(tmp_path: Path) -> None:
    adapted = adapt(tiny_llama(), EVERYWHERE, 0, tmp_path / "start")
    learn(adapted)
    save_adapter(adapted, tmp_path / "adapter", tmp_path / "start")
    assert not trainable(open_adapted(tiny_llama(), tmp_path / "adapter"))
    going_on = open_adapted(tiny_llama(), tmp_path / "adapter", trains=True)
    assert len(trainable(going_on)) == len(trainable(adapted))
    assert torch.equal(going_on(TOKENS).logits, adapted(TOKENS).logits)


def test_a_folder_without_an_adapter_is_said_to_be_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no adapter \(adapter_config.json"):
        open_adapted(tiny_llama(), tmp_path)


def test_models_of_other_families_are_adapted_where_their_layers_are_linear() -> None:
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no linear layer"):
        adapt(tiny_gpt2(), EVERYWHERE, 0, Path("unused"))
    assert isinstance(tiny_llama().lm_head, nn.Linear)
    assert not any("lm_head" in name for name in linear_layers(tiny_llama()))
