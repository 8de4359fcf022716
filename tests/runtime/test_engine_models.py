"""The engine decodes what transformers' own `generate` does, for every kind of model."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)  # fmt: skip

from modeling.lora import AdapterShape, adapt, merged
from modeling.moe import ExpertsShape, add_experts
from runtime.generation.answers import Answer, Sampling
from runtime.generation.engine import Engine
from tests.runtime.conversing import letters
from tests.tiny import tiny_gpt2, tiny_llama, tiny_mamba

SHAPE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 97, "initializer_range": 0.2,
    "max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
GREEDY = Sampling(temperature=0, top_p=1, max_own_tokens=16, max_calls=0, seed=0)
SAMPLED = Sampling(temperature=1, top_p=1, max_own_tokens=16, max_calls=0, seed=0)


def family(kind: type, config: type, **more) -> PreTrainedModel:
    torch.manual_seed(0)
    return kind(config(**{**SHAPE, **more})).eval()


def without_end(model: PreTrainedModel) -> PreTrainedModel:
    model.generation_config.eos_token_id = None
    return model


def uneven() -> PreTrainedModel:
    """A Llama whose second block has fewer heads and neurons than the others."""
    model = tiny_llama()
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
    attention.num_key_value_groups = 3
    for name, rows in (("q_proj", 24), ("k_proj", 8), ("v_proj", 8)):
        setattr(attention, name, narrowed(getattr(attention, name), rows, 32))
    attention.o_proj = narrowed(attention.o_proj, 32, 24)
    mlp.gate_proj, mlp.up_proj = (narrowed(p, 40, 32) for p in (mlp.gate_proj, mlp.up_proj))
    mlp.down_proj = narrowed(mlp.down_proj, 32, 40)
    return model


def narrowed(linear: nn.Linear, rows: int, columns: int) -> nn.Linear:
    smaller = nn.Linear(columns, rows, bias=False)
    smaller.weight.data = linear.weight.data[:rows, :columns].clone()
    return smaller


PACKED = {
    "llama": tiny_llama,
    "mistral": lambda: family(MistralForCausalLM, MistralConfig),
    "qwen2, with biases": lambda: family(Qwen2ForCausalLM, Qwen2Config),
    "blocks of several widths": uneven,
}
CACHED = {
    "gpt2": tiny_gpt2,
    "mamba": tiny_mamba,
    "gemma2, other norms": lambda: family(Gemma2ForCausalLM, Gemma2Config),
    "mistral, a short window": lambda: family(MistralForCausalLM, MistralConfig, sliding_window=6),
}
EVERY = {**PACKED, **CACHED}


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, 97, (n,), generator=generator).tolist() for n in lengths]


def engine(model: PreTrainedModel, **options) -> Engine:
    options = {"half_weights": False, **options}
    made = Engine(without_end(model), letters(), **options)
    made._ends = frozenset()  # random models end at random
    return made


def generated(model: PreTrainedModel, prompt: list[int], tokens: int) -> list[int]:
    row = model.generate(
        torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, pad_token_id=0
    )
    return row[0, len(prompt) :].tolist()


@torch.no_grad()
def log_probs(model: PreTrainedModel, prompt: list[int], answer: Answer) -> Tensor:
    """What the model itself gives an answer's tokens, all in one forward."""
    logits = model(torch.tensor([prompt + answer.tokens])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(answer.tokens)[:, None])[:, 0]


@pytest.mark.parametrize("name", EVERY)
def test_greedy_answers_are_those_of_generate(name: str) -> None:
    model = without_end(EVERY[name]())
    several = prompts(5, 9, 3, 9)
    for prompt, group in zip(several, engine(model).answer(several, 2, GREEDY), strict=True):
        expected = generated(model, prompt, 16)
        assert [answer.tokens for answer in group] == [expected, expected]
        assert all(answer.finished == "length" and all(answer.own) for answer in group)


@pytest.mark.parametrize("name", EVERY)
def test_log_probabilities_are_the_models_own(name: str) -> None:
    model = EVERY[name]()
    several = prompts(4, 7)
    for prompt, group in zip(several, engine(model).answer(several, 3, SAMPLED), strict=True):
        for answer in group:
            own = log_probs(model, prompt, answer)
            assert torch.tensor(answer.log_probs) == pytest.approx(own, abs=1e-4)


@pytest.mark.parametrize("name", PACKED)
def test_a_model_like_llama_is_decoded_from_packed_weights(name: str) -> None:
    assert "packed" in engine(PACKED[name]()).path


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("gpt2", "rotary"),
        ("mamba", "rotary"),
        ("gemma2, other norms", "4 RMSNorms"),
        ("mistral, a short window", "window of 6"),
    ],
)
def test_another_model_goes_through_its_own_cache_and_the_engine_says_why(
    name: str, why: str
) -> None:
    path = engine(CACHED[name]()).path
    assert path.startswith("through transformers' own cache") and why in path


def test_a_model_with_a_llamas_parts_and_another_formula_is_found_out() -> None:
    model = tiny_llama()
    model.model.layers[1].self_attn.scaling = 0.1
    assert "logits are" in engine(model).path


def test_a_model_with_experts_behind_a_block_is_not_packed_past_them() -> None:
    model = without_end(tiny_llama())
    shape = ExpertsShape(after_block=1, experts=2, units=4, temperature=0.7, balance=0.01)
    add_experts(model, shape, torch.arange(20).view(2, 10), seed=0)
    assert "has a hook" in engine(model).path


def test_weights_in_half_precision_give_nearly_the_same_log_probabilities() -> None:
    model = tiny_llama()
    several = prompts(4, 7)
    made = engine(model, half_weights=True)
    for prompt, group in zip(several, made.answer(several, 3, SAMPLED), strict=True):
        for answer in group:
            own = log_probs(model, prompt, answer)
            assert torch.tensor(answer.log_probs) == pytest.approx(own, abs=3e-2)


@pytest.mark.parametrize("name", PACKED)
def test_a_model_in_bfloat16_is_decoded_in_it(name: str) -> None:
    model = PACKED[name]().bfloat16()
    made = engine(model)
    assert "packed" in made.path and "bfloat16" in made.path
    for prompt, (answer,) in zip(prompts(4), made.answer(prompts(4), 1, SAMPLED), strict=True):
        own = log_probs(model, prompt, answer).float()
        assert torch.tensor(answer.log_probs) == pytest.approx(own, abs=0.2)  # 8 bits


def test_changed_matrices_count_from_the_next_refresh_on() -> None:
    model, several = tiny_llama(), prompts(5, 6)
    made = engine(model)
    before = made.answer(several, 1, GREEDY)
    model.model.layers[1].mlp.up_proj.weight.data.neg_()
    assert made.answer(several, 1, GREEDY) == before
    made.refresh()
    assert made.answer(several, 1, GREEDY) == engine(model).answer(several, 1, GREEDY) != before


def test_a_model_in_training_answers_without_dropout_and_stays_in_training() -> None:
    model = tiny_gpt2()
    expected = engine(copy.deepcopy(model)).answer(prompts(5), 1, GREEDY)
    model.train()
    assert engine(model).answer(prompts(5), 1, GREEDY) == expected
    assert model.training


def adapted_llama():
    """A Llama with an adapter that changes what it says."""
    adapted = adapt(tiny_llama(), AdapterShape(4, 8, "lora"), 0, Path())
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.2, generator=generator)
    return adapted


def test_a_merged_adapter_is_packed_and_stays_packed_when_it_is_taken_out_again() -> None:
    adapted, several = adapted_llama(), prompts(5, 8)
    with merged(adapted) as model:
        made = engine(model)
    assert "packed" in made.path
    for prompt, (answer,) in zip(several, made.answer(several, 1, GREEDY), strict=True):
        own = log_probs(adapted, prompt, answer)
        assert torch.tensor(answer.log_probs) == pytest.approx(own, abs=1e-4)
    without = engine(tiny_llama()).answer(several, 1, GREEDY)
    assert made.answer(several, 1, GREEDY) != without


def test_an_adapter_that_is_not_merged_is_refused() -> None:
    adapted = adapted_llama()
    with merged(adapted) as model:
        made = engine(model)
    with pytest.raises(ValueError, match=r"default are not merged.*merge_adapter"):
        made.refresh()


def test_a_recurrent_model_answers_with_its_adapter() -> None:
    adapted = adapt(tiny_mamba(), AdapterShape(4, 8, "lora"), 0, Path())
    (answer,) = engine(adapted).answer(prompts(5), 1, GREEDY)[0]
    own = log_probs(adapted, prompts(5)[0], answer)
    assert torch.tensor(answer.log_probs) == pytest.approx(own, abs=1e-4)
