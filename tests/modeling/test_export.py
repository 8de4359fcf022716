"""A student as GGUF: what is read back, what is refused, and what the command says."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Regex, pre_tokenizers
from torch import Tensor

from modeling.export import export_gguf, main
from modeling.gguf import convert_gguf
from modeling.gguf_tokenizer import SPLITTERS, restore_splitter
from tests.modeling.vocabularies import trained_bpe
from tests.tiny import _random, tiny_gpt2, tiny_llama, tiny_mamba

VOCABULARY = 320  # rows; the tokenizer has 300 tokens, so that some have none


@pytest.fixture(scope="module")
def tokenizer():
    return trained_bpe(300)


def saved(model, tokenizer, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def weights_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def read_back(file: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    folder = file.with_suffix("")
    folder.mkdir()
    convert_gguf(file, folder, dtype)
    return weights_of(folder)


def tiny_qwen2():
    """Other names, biases, another rotation."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=VOCABULARY, tie_word_embeddings=True,
    )  # fmt: skip
    model = _random(Qwen2ForCausalLM, config, 0)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    return model


@pytest.mark.parametrize("kind", ["f32", "bf16"])
def test_a_llama_is_read_back_to_the_bit(tmp_path, tokenizer, kind) -> None:
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[kind]
    model = tiny_llama(vocab=VOCABULARY).to(dtype)
    folder = saved(model, tokenizer, tmp_path / "student")
    export_gguf(folder, tmp_path / "it.gguf")
    back = read_back(tmp_path / "it.gguf", dtype)
    assert back.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(back[name], tensor), name


def test_a_qwen2_with_biases_and_one_matrix_for_both_ends_is_read_back(tmp_path, tokenizer) -> None:
    model = tiny_qwen2()
    folder = saved(model, tokenizer, tmp_path / "student")
    export_gguf(folder, tmp_path / "it.gguf")
    back = read_back(tmp_path / "it.gguf", torch.float32)
    assert "lm_head.weight" not in back
    assert any(name.endswith("q_proj.bias") for name in back)
    for name, tensor in back.items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_a_mistral_is_written_as_a_llama_unless_its_attention_is_cut(tmp_path, tokenizer) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, vocab_size=VOCABULARY, sliding_window=None,
    )  # fmt: skip
    model = _random(MistralForCausalLM, config, 0)
    export_gguf(saved(model, tokenizer, tmp_path / "student"), tmp_path / "it.gguf")
    for name, tensor in read_back(tmp_path / "it.gguf", torch.float32).items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    model.config.sliding_window = 64
    folder = saved(model, tokenizer, tmp_path / "cut")
    with pytest.raises(ValueError, match="cut at a window of 64 tokens"):
        export_gguf(folder, tmp_path / "cut.gguf")


def test_a_mamba_is_read_back_but_for_the_rounding_of_a_logarithm(tmp_path, tokenizer) -> None:
    model = tiny_mamba(vocab=VOCABULARY)
    folder = saved(model, tokenizer, tmp_path / "student")
    export_gguf(folder, tmp_path / "it.gguf")
    back = read_back(tmp_path / "it.gguf", torch.float32)
    for name, tensor in back.items():
        expected = model.state_dict()[name]
        if name.endswith("A_log"):
            torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(tensor, expected), name


def test_the_tokenizer_comes_along(tmp_path, tokenizer) -> None:
    from transformers import AutoTokenizer

    tokenizer.chat_template = "{{ messages[0].content }}"
    folder = saved(tiny_llama(vocab=VOCABULARY), tokenizer, tmp_path / "student")
    export_gguf(folder, tmp_path / "it.gguf")
    back = AutoTokenizer.from_pretrained(tmp_path, gguf_file="it.gguf")
    text = "then the naïve distribution 1,000 <end> 🙂"
    assert back.encode(text) == tokenizer.encode(text)
    assert back.eos_token_id == tokenizer.eos_token_id
    assert back.chat_template == tokenizer.chat_template


def test_eight_bits_are_within_half_a_step_and_the_rounding_of_it(tmp_path, tokenizer) -> None:
    model = tiny_llama(vocab=VOCABULARY)
    counts = export_gguf(saved(model, tokenizer, tmp_path / "s"), tmp_path / "it.gguf", "q8_0")
    assert counts == {"q8_0": 23, "f32": 7}
    back = read_back(tmp_path / "it.gguf", torch.float32)
    name = "model.layers.1.mlp.down_proj.weight"
    exact = model.state_dict()[name].unflatten(1, (-1, 32))
    step = exact.abs().amax(-1, keepdim=True) / 127
    # half a step, and what 127 steps are off by a scale that is rounded to float16
    assert ((back[name].unflatten(1, (-1, 32)) - exact).abs() <= (0.5 + 127 * 2**-11) * step).all()


def test_four_bits_leave_the_vocabulary_at_eight_and_short_rows_at_sixteen(tmp_path, tokenizer):
    student = saved(tiny_llama(vocab=VOCABULARY, width=32), tokenizer, tmp_path / "even")
    assert export_gguf(student, tmp_path / "it.gguf", "q4_0") == {"q4_0": 21, "f32": 7, "q8_0": 2}
    student = saved(tiny_llama(vocab=VOCABULARY, width=24), tokenizer, tmp_path / "odd")
    assert export_gguf(student, tmp_path / "it.gguf", "q4_0") == {"f16": 23, "f32": 7}


def test_llama_3s_slower_rotations_are_written_as_factors(tmp_path, tokenizer) -> None:
    from gguf import GGUFReader

    model = tiny_llama(vocab=VOCABULARY, width=64)
    model.config.rope_parameters = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    }  # fmt: skip
    export_gguf(saved(model, tokenizer, tmp_path / "student"), tmp_path / "it.gguf")
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "it.gguf").tensors}
    factors = tensors["rope_freqs.weight"]
    assert len(factors) == 8
    assert factors[0] == pytest.approx(1.0) and factors[-1] == pytest.approx(8.0)


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ([pre_tokenizers.ByteLevel(add_prefix_space=False)], "gpt-2"),
        ([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)], "smollm"),
        ([pre_tokenizers.Digits(False), pre_tokenizers.ByteLevel(add_prefix_space=False)], None),
        ([pre_tokenizers.ByteLevel(add_prefix_space=True)], None),
        ([pre_tokenizers.Split(Regex("x"), "isolated")], None),
    ],
)
def test_a_splitter_is_found_by_what_it_does_or_refused(tmp_path, steps, name) -> None:
    from gguf import GGUFReader

    made = trained_bpe(300)
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    folder = saved(tiny_llama(vocab=VOCABULARY), made, tmp_path / "student")
    if name is None:
        with pytest.raises(ValueError, match="llama.cpp has no name for"):
            export_gguf(folder, tmp_path / "it.gguf")
    else:
        export_gguf(folder, tmp_path / "it.gguf")
        fields = GGUFReader(tmp_path / "it.gguf").fields
        assert fields["tokenizer.ggml.pre"].contents() == name


TEXT = "then 1,000 of  12 lines\n   345 x'll  \n\n naïve"


@pytest.mark.parametrize("steps", [steps for steps in SPLITTERS])
def test_a_splitter_is_restored_from_its_name(tmp_path, steps) -> None:
    """transformers reads tokens and merges of a file, and splits as it likes."""
    from transformers import AutoTokenizer

    made = trained_bpe(300)
    restore_splitter(made, SPLITTERS[steps][0])
    made.backend_tokenizer.model.ignore_merges = SPLITTERS[steps][1]
    export_gguf(saved(tiny_llama(vocab=VOCABULARY), made, tmp_path / "s"), tmp_path / "it.gguf")
    read_back(tmp_path / "it.gguf", torch.bfloat16)
    back = AutoTokenizer.from_pretrained(tmp_path / "it")
    splits = [t.backend_tokenizer.pre_tokenizer.pre_tokenize_str(TEXT) for t in (back, made)]
    assert splits[0] == splits[1]
    assert back.encode(TEXT) == made.encode(TEXT)


def test_an_unknown_splitter_is_told(tokenizer) -> None:
    with pytest.warns(UserWarning, match="splits as 'poro-chat', which is not known here"):
        restore_splitter(tokenizer, "poro-chat")


def test_what_cannot_be_written_is_refused_by_name(tmp_path, tokenizer) -> None:
    def refused(model, name: str, tokenizer=tokenizer) -> str:
        folder = saved(model, tokenizer, tmp_path / name)
        with pytest.raises(ValueError) as caught:
            export_gguf(folder, tmp_path / "it.gguf")
        return str(caught.value)

    assert "gpt2 cannot be written" in refused(tiny_gpt2(vocab=VOCABULARY), "family")
    model = tiny_llama(vocab=VOCABULARY)
    model.config.hidden_act = "gelu"
    assert "hidden_act is gelu" in refused(model, "activation")
    model = tiny_llama(vocab=VOCABULARY)
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert "rope_type is dynamic" in refused(model, "rope")
    pieces = trained_bpe(300, byte_level=False)
    assert "byte fallback" in refused(tiny_llama(vocab=VOCABULARY + 300), "pieces", pieces)
    assert "do not belong together" in refused(tiny_llama(vocab=97), "small")
    assert not list(tmp_path.glob("*.gguf*"))


def test_another_models_config_is_refused_before_anything_is_written(tmp_path, tokenizer) -> None:
    folder = saved(tiny_llama(vocab=VOCABULARY, blocks=2), tokenizer, tmp_path / "student")
    tiny_llama(vocab=VOCABULARY, blocks=3).config.save_pretrained(folder)
    with pytest.raises(ValueError, match="lacks 9 of the 30 tensors"):
        export_gguf(folder, tmp_path / "it.gguf")


def test_a_number_too_large_for_a_type_is_refused_and_nothing_is_left(tmp_path, tokenizer) -> None:
    model = tiny_llama(vocab=VOCABULARY)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e6
    folder = saved(model, tokenizer, tmp_path / "student")
    with pytest.raises(ValueError, match="up_proj.weight holds 1e\\+06, which f16 cannot"):
        export_gguf(folder, tmp_path / "it.gguf", "f16")
    assert os.listdir(tmp_path) == ["student"]


def test_the_command_says_what_it_wrote_and_what_is_wrong_in_a_line(
    tmp_path, tokenizer, capsys
) -> None:
    folder = saved(tiny_llama(vocab=VOCABULARY), tokenizer, tmp_path / "student")
    assert main([str(folder), str(tmp_path / "it.gguf"), "--type", "q8_0"]) == 0
    assert "23 q8_0, 7 f32" in capsys.readouterr().out
    assert main([str(tmp_path / "nothing"), str(tmp_path / "x.gguf")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "nothing" in error
