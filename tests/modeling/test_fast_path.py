"""The fast path: a model computes the same with it to rounding, and is stock again behind it."""

import copy

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)  # fmt: skip

from modeling.fast_path import ATTENTION, MOST_TOKENS, fast_path
from tests.tiny import tiny_gpt2, tiny_llama, tiny_mamba

SHAPE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 97,
}  # fmt: skip
TOKENS = torch.arange(2 * 24).reshape(2, 24).remainder(97)


def family(kind: type, config: type, **more) -> PreTrainedModel:
    torch.manual_seed(0)
    return kind(config(**SHAPE, initializer_range=0.2, **more)).eval()


def loss_and_gradients(model: PreTrainedModel, tokens: Tensor = TOKENS) -> tuple[float, Tensor]:
    model.requires_grad_(True).zero_grad()
    loss = model(tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten().float() for p in model.parameters()])


def assert_the_same(model: PreTrainedModel, cosine: float, error: float) -> list[str]:
    """Loss and gradients with the fast path are those without; gives what was said."""
    said: list[str] = []
    loss, gradients = loss_and_gradients(model)
    with fast_path(model, said.append):
        found, ours = loss_and_gradients(model)
    assert found == pytest.approx(loss, rel=error)
    assert torch.cosine_similarity(ours, gradients, dim=0) > cosine
    assert loss_and_gradients(model)[0] == loss  # its own code again, to the bit
    return said


def replaced(model: PreTrainedModel) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


def test_a_llama_computes_the_same_with_every_norm_and_mlp_replaced() -> None:
    model = tiny_llama()
    assert assert_the_same(model, 1 - 1e-6, 1e-6) == []
    with fast_path(model, print):
        assert len(replaced(model)) == 3 * len(model.model.layers) + 1
        assert model.config._attn_implementation == "sdpa"  # of float32, torch's is as fast


def test_in_bfloat16_attention_is_replaced_too() -> None:
    model = tiny_llama().bfloat16()
    assert assert_the_same(model, 0.995, 1e-2) == []
    with fast_path(model, print):
        assert model.config._attn_implementation == ATTENTION


def test_norms_of_queries_and_keys_are_replaced_too() -> None:
    model = family(Qwen3ForCausalLM, Qwen3Config)
    assert assert_the_same(model, 1 - 1e-6, 1e-6) == []
    with fast_path(model, print):
        assert "model.layers.0.self_attn.q_norm" in replaced(model)


def test_no_gradient_is_needed_to_use_it() -> None:
    model = tiny_llama()
    with torch.no_grad(), fast_path(model, print):
        ours = model(TOKENS).logits
    torch.testing.assert_close(ours, model(TOKENS).logits, atol=1e-4, rtol=1e-4)


def test_a_model_is_stock_again_after_an_error() -> None:
    model = tiny_llama().bfloat16()
    stock = model.config.to_dict()
    with pytest.raises(KeyboardInterrupt), fast_path(model, print):
        raise KeyboardInterrupt
    assert not replaced(model)
    assert model.config._attn_implementation == "sdpa"
    assert model.config.to_dict() == stock


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_mamba])
def test_other_kinds_of_blocks_are_left_alone(make) -> None:
    model = make(blocks=1)
    with fast_path(model, print):
        pass
    assert_the_same(model, 1 - 1e-6, 1e-6)


def test_what_computes_something_else_keeps_its_own_code_and_is_named_once() -> None:
    model = family(Gemma2ForCausalLM, Gemma2Config)  # 1 + weight, GELU, a softcap
    said = assert_the_same(model, 1 - 1e-9, 1e-9)
    assert len(said) == 2
    assert any("Gemma2RMSNorm" in line for line in said)
    assert any("Gemma2MLP" in line for line in said)


@pytest.mark.parametrize("change", ["bias", "activation"])
def test_an_mlp_with_a_difference_keeps_its_own_code(change: str) -> None:
    model = tiny_llama().bfloat16()
    mlp = model.model.layers[1].mlp
    if change == "bias":
        mlp.up_proj.bias = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    else:
        mlp.act_fn = torch.nn.GELU()
    said: list[str] = []
    with fast_path(model, said.append):
        names = replaced(model)
    assert "model.layers.0.mlp" in names and "model.layers.1.mlp" not in names
    assert len(said) == 1 and "LlamaMLP" in said[0]


def test_a_sliding_window_shorter_than_a_row_keeps_torchs_attention() -> None:
    model = family(MistralForCausalLM, MistralConfig, sliding_window=8).bfloat16()
    said = assert_the_same(model, 0.995, 1e-2)
    assert said == ["fast path: MistralAttention has a mask; it keeps its own code"]


def test_a_long_row_keeps_torchs_attention() -> None:
    model = tiny_llama(blocks=1).bfloat16()
    model.config.max_position_embeddings = 2 * MOST_TOKENS
    said: list[str] = []
    with fast_path(model, said.append):
        model(torch.zeros(1, MOST_TOKENS, dtype=torch.int64))
        assert not said
        for _ in range(2):
            model(torch.zeros(1, MOST_TOKENS + 1, dtype=torch.int64))
    assert len(said) == 1 and f"more than {MOST_TOKENS} tokens" in said[0]


def test_padding_is_masked_with_it_as_without() -> None:
    model = tiny_llama().bfloat16()
    mask = torch.ones_like(TOKENS)
    mask[0, :6] = 0
    with torch.no_grad():
        own = model(TOKENS, attention_mask=mask).logits
        with fast_path(model, print):
            ours = model(TOKENS, attention_mask=mask).logits
    real = mask.bool()
    torch.testing.assert_close(ours[real], own[real], atol=0.1, rtol=0.1)


def test_a_saved_model_is_stock(tmp_path) -> None:
    model = tiny_llama().bfloat16()
    copy.deepcopy(model).save_pretrained(tmp_path / "stock")
    with fast_path(model, print):
        model.save_pretrained(tmp_path / "within")
    stock, within = ((tmp_path / n / "config.json").read_text() for n in ("stock", "within"))
    assert stock == within


def test_a_mamba_scans_in_linear_time_within_and_as_before_behind() -> None:
    model = tiny_mamba()
    assert assert_the_same(model, 1 - 1e-6, 1e-5) == []
    with fast_path(model, print):
        mixers = [name for name in replaced(model) if name.endswith("mixer")]
        assert len(mixers) == len(model.backbone.layers)
    assert replaced(model) == []
