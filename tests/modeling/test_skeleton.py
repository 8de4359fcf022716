"""Skeletons: nothing in them but what is computed; filled, they are what from_pretrained makes."""

import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from modeling.blocks import find_units
from modeling.checkpoint import BadCheckpoint, read_checkpoint
from modeling.skeleton import OUTSIDE, CannotStream, Skeleton, build_skeleton
from modeling.teacher import open_teacher
from modeling.weights import map_tensors
from tests.causal_lms import tiny_model
from tests.tiny import REPOSITORY, tiny_gpt2, tiny_llama, tiny_mamba

FAMILIES = {
    "llama": tiny_llama,
    "gpt2": tiny_gpt2,
    "mamba": tiny_mamba,
    "mixtral": lambda: tiny_model("mixtral"),
    "qwen3_moe": lambda: tiny_model("qwen3_moe"),
    "gemma2": lambda: tiny_model("gemma2"),
    "zamba2": lambda: tiny_model("zamba2"),  # blocks that share weights
    "gpt_neo": lambda: tiny_model("gpt_neo"),  # buffers in its blocks
}
TOKENS = torch.arange(2 * 9).view(2, 9).mul(31).remainder(90).add(3)

every_family = pytest.mark.parametrize("family", FAMILIES)


def saved(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def skeleton_of(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> Skeleton:
    return build_skeleton(type(model), model.config, read_checkpoint(folder), dtype)


def whole(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    return type(model).from_pretrained(folder, local_files_only=True, dtype=dtype).eval()


def fill_part(skeleton: Skeleton, folder: Path, part: int) -> None:
    places = read_checkpoint(folder).tensors
    skeleton.fill(map_tensors({name: places[name] for name in skeleton.parts[part]}))


def everything(model: PreTrainedModel) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


# --- empty -----------------------------------------------------------------------------------


@every_family
def test_a_skeleton_holds_no_weights_but_the_buffers_that_are_computed(
    family: str, tmp_path: Path
) -> None:
    model = FAMILIES[family]()
    skeleton = skeleton_of(model, saved(model, tmp_path), torch.float32)
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())
    reference = whole(model, tmp_path, torch.float32)
    stored = set(reference.state_dict())
    computed = {n: t for n, t in reference.named_buffers() if n not in stored}
    found = {n: t for n, t in skeleton.model.named_buffers() if n not in stored}
    assert_equal(found, computed)
    assert not skeleton.model.training
    assert not any(parameter.requires_grad for parameter in skeleton.model.parameters())


@every_family
def test_every_tensor_of_the_checkpoint_is_in_one_part(family: str, tmp_path: Path) -> None:
    model = FAMILIES[family]()
    skeleton = skeleton_of(model, saved(model, tmp_path), torch.float32)
    names = [name for part in skeleton.parts.values() for name in part]
    assert len(names) == len(set(names))
    assert set(names) == set(read_checkpoint(tmp_path).tensors)
    assert set(skeleton.parts) - {OUTSIDE} <= set(range(len(skeleton.blocks)))


# --- filled ----------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=["from 32", "from 16"])
@pytest.mark.parametrize("opened", [torch.float32, torch.bfloat16], ids=["as 32", "as 16"])
def test_filled_it_is_what_from_pretrained_makes(
    family: str, stored: torch.dtype, opened: torch.dtype, tmp_path: Path
) -> None:
    model = FAMILIES[family]().to(stored)
    skeleton = skeleton_of(model, saved(model, tmp_path), opened)
    for part in skeleton.parts:
        fill_part(skeleton, tmp_path, part)
    reference = whole(model, tmp_path, opened)
    assert_equal(everything(skeleton.model), everything(reference))
    with torch.no_grad():
        found, expected = (m(TOKENS, use_cache=False).logits for m in (skeleton.model, reference))
    assert torch.equal(found, expected)


@every_family
def test_a_block_is_filled_alone_and_emptied_again(family: str, tmp_path: Path) -> None:
    model = FAMILIES[family]()
    skeleton = skeleton_of(model, saved(model, tmp_path), torch.float32)
    reference = dict(whole(model, tmp_path, torch.float32).named_parameters())
    for part in [0, 2, 0, 1]:
        fill_part(skeleton, tmp_path, part)
        held = {n: p for n, p in skeleton.model.named_parameters() if not p.is_meta}
        inside = {id(p) for p in skeleton.blocks[part].parameters()}
        assert held and {id(p) for p in held.values()} <= inside
        assert_equal(held, {name: reference[name] for name in held})
        skeleton.empty(part)
        assert all(parameter.is_meta for parameter in skeleton.model.parameters())


def test_a_tied_head_is_the_embedding_after_filling(tmp_path: Path) -> None:
    model = tiny_gpt2()
    skeleton = skeleton_of(model, saved(model, tmp_path), torch.float32)
    assert "lm_head.weight" not in read_checkpoint(tmp_path).tensors
    fill_part(skeleton, tmp_path, OUTSIDE)
    assert skeleton.model.lm_head.weight is skeleton.model.transformer.wte.weight
    assert torch.equal(skeleton.model.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("kept", [("wte",), ("lm_head",), ("wte", "lm_head")], ids="+".join)
@pytest.mark.parametrize("other", [False, True])
def test_a_checkpoint_with_either_or_both_of_two_tied_tensors_is_opened_as_ever(
    kept: tuple[str, ...], other: bool, tmp_path: Path
) -> None:
    model = tiny_gpt2()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if other:
        state["lm_head.weight"] += 1
    tied = {"wte": "transformer.wte.weight", "lm_head": "lm_head.weight"}
    for name in tied.keys() - set(kept):
        del state[tied[name]]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(tmp_path)
    skeleton = skeleton_of(model, tmp_path, torch.float32)
    for part in skeleton.parts:
        fill_part(skeleton, tmp_path, part)
    assert_equal(skeleton.model.state_dict(), whole(model, tmp_path, torch.float32).state_dict())


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_that_are_stored_one_by_one_come_out_fused(family: str, tmp_path: Path) -> None:
    model = FAMILIES[family]()
    skeleton = skeleton_of(model, saved(model, tmp_path), torch.float32)
    single = [name for name in read_checkpoint(tmp_path).tensors if ".experts.3." in name]
    assert len(single) == 3 * len(skeleton.blocks) and set(single) <= skeleton.fused
    fill_part(skeleton, tmp_path, 1)
    reference = find_units(whole(model, tmp_path, torch.float32))[1]
    fused = {n: p for n, p in reference.named_parameters() if n.endswith("experts.gate_up_proj")}
    assert fused
    found = dict(skeleton.blocks[1].named_parameters())
    assert_equal({name: found[name] for name in fused}, fused)
    assert not any("self_attn" in name or "layernorm" in name for name in skeleton.fused)


# --- refused ---------------------------------------------------------------------------------

GONE = ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]


def changed(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> PreTrainedModel:
    """A tiny llama whose saved tensors were changed."""
    model = tiny_llama()
    saved(model, folder)
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return model


@pytest.mark.parametrize("name", GONE)
def test_a_tensor_that_is_missing_is_named(name: str, tmp_path: Path) -> None:
    model = changed(tmp_path, lambda state: state.pop(name))
    with pytest.raises(BadCheckpoint, match=f"{tmp_path} lacks 1 tensors .* '{name}' among them"):
        skeleton_of(model, tmp_path, torch.float32)


@pytest.mark.parametrize("name", GONE)
@pytest.mark.parametrize("shape", [(3, 3), (97,), (32, 64), ()], ids=str)
def test_a_tensor_of_another_shape_is_named(
    name: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    model = changed(tmp_path, lambda state: state.update({name: torch.zeros(shape)}))
    with pytest.raises(BadCheckpoint, match=re.escape(f"'{name}' is {shape}, the configuration")):
        skeleton_of(model, tmp_path, torch.float32)


def test_another_architectures_checkpoint_is_refused(tmp_path: Path) -> None:
    saved(tiny_gpt2(), tmp_path)
    with pytest.raises(BadCheckpoint, match="LlamaForCausalLM needs.*of another model"):
        skeleton_of(tiny_llama(), tmp_path, torch.float32)


@pytest.mark.parametrize("size", [{"width": 64}, {"vocab": 98}, {"blocks": 4}], ids=str)
def test_a_checkpoint_of_another_size_is_refused(size: dict, tmp_path: Path) -> None:
    saved(tiny_llama(), tmp_path)
    with pytest.raises(BadCheckpoint, match=f"{tmp_path}.*of another model"):
        skeleton_of(tiny_llama(**size), tmp_path, torch.float32)


def test_a_large_models_configuration_beside_a_small_checkpoint_takes_no_memory(
    tmp_path: Path,
) -> None:
    """transformers would make room for all that is missing, and draw numbers for it: 1 GiB here."""
    saved(tiny_llama(), tmp_path)
    code = """if True:
        import sys, torch
        from pathlib import Path
        from transformers import LlamaConfig, LlamaForCausalLM
        from modeling.checkpoint import BadCheckpoint, read_checkpoint
        from modeling.skeleton import build_skeleton
        from stages.process import peak_memory_bytes
        config = LlamaConfig(hidden_size=2048, intermediate_size=5632, num_hidden_layers=8)
        before = peak_memory_bytes()
        try:
            build_skeleton(
                LlamaForCausalLM, config, read_checkpoint(Path(sys.argv[1])), torch.bfloat16
            )
        except BadCheckpoint as error:
            print(peak_memory_bytes() - before >> 20, error)
    """
    command = [sys.executable, "-c", code, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    grown_mib, said = done.stdout.split(" ", 1)
    assert int(grown_mib) < 50 and "of another model" in said


def test_tensors_that_the_model_has_no_use_for_are_ignored(tmp_path: Path) -> None:
    extra = {
        "model.layers.7.mlp.up_proj.weight": torch.ones(3),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),  # old checkpoints have it
        "score.weight": torch.ones(2, 2),
    }
    model = changed(tmp_path, lambda state: state.update(extra))
    skeleton = skeleton_of(model, tmp_path, torch.float32)
    assert not set(extra) & {name for part in skeleton.parts.values() for name in part}
    for part in skeleton.parts:
        fill_part(skeleton, tmp_path, part)
    assert_equal(everything(skeleton.model), everything(model))


# --- what cannot be streamed -----------------------------------------------------------------


def test_a_model_whose_loading_looks_at_values_is_refused_by_name(tmp_path: Path) -> None:
    model = tiny_model("qwen4_exp_text")
    with pytest.raises(CannotStream, match="a qwen4_exp_text cannot be streamed.*fit into memory"):
        skeleton_of(model, saved(model, tmp_path), torch.float32)
    with pytest.raises(CannotStream, match="qwen4_exp_text"):
        open_teacher(tmp_path, "streamed", 18, 18)


@pytest.mark.parametrize("engine", ["auto", "resident"])
def test_a_model_that_cannot_be_streamed_runs_where_it_fits(engine: str, tmp_path: Path) -> None:
    model = tiny_model("qwen4_exp_text")
    teacher = open_teacher(saved(model, tmp_path), engine, 18, 18)
    assert teacher.plan.engine == "resident"
    passage = teacher.passage([TOKENS])
    assert len([arrival for arrival in passage.run() if arrival.block >= 0]) == 4


def test_building_says_nothing_of_loading(
    tmp_path: Path, capfd: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_llama()
    saved(model, tmp_path)
    capfd.readouterr()
    with caplog.at_level(logging.WARNING):
        skeleton = skeleton_of(model, tmp_path, torch.float32)
        for part in skeleton.parts:
            fill_part(skeleton, tmp_path, part)
    assert "Loading weights" not in "".join(capfd.readouterr()) + caplog.text
