"""Quantised checkpoints: streamed or in memory, they are the plain model of what is stored."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from modeling.answers import read_answers
from modeling.checkpoint import BadCheckpoint, Packed, read_checkpoint
from modeling.describe import describe
from modeling.memory import need_of
from modeling.packed import open_packed, stored_places
from modeling.skeleton import CannotStream
from modeling.teacher import open_teacher, read_config
from tests.coverage import Outputs, whole_forward
from tests.modeling.passages import batches_of, finish
from tests.modeling.quantised import FORMS, save, settle, write

every_form = pytest.mark.parametrize("form", FORMS)
ENGINES = ["streamed", "resident"]
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine that has units for it; what is compared with is made so, too."""
    for module in ("teacher", "loading"):
        monkeypatch.setattr(f"modeling.{module}.compute_dtype", lambda _device: BF16)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def whole(folder: Path, **options: object) -> tuple[Outputs, list[Tensor], list[Tensor]]:
    """States and logits by transformers alone, and the token ids."""
    opener = AutoModelForCausalLM
    model = opener.from_pretrained(folder, local_files_only=True, dtype=BF16, **options).eval()
    batches = batches_of(model, [(2, 12), (1, 7)])
    return *whole_forward(model, batches), [batch["input_ids"] for batch in batches]


def by(engine: str, folder: Path, tokens: list[Tensor]) -> tuple[Outputs, list[Tensor]]:
    with contextlib.closing(open_teacher(folder, engine, 24, 31)) as teacher:
        assert teacher.plan.engine == engine
        passage = teacher.passage(tokens)
        states = {(a.block, a.batch): a.hidden.clone() for a in passage.run() if a.block >= 0}
        return states, finish(passage)


def assert_equal(found: tuple[Outputs, list[Tensor]], expected: tuple) -> None:
    assert set(found[0]) == set(expected[0])
    assert all(torch.equal(found[0][place], expected[0][place]) for place in expected[0])
    assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True))


# --- the same numbers ------------------------------------------------------------------------


@pytest.mark.parametrize("form", [form for form in FORMS if "experts" in form])
def test_experts_that_are_read_as_routed_to_are_unpacked_one_by_one(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantised, _ = write(FORMS[form], tmp_path)
    tokens = [torch.arange(5).view(1, 5)]
    whole_blocks = by("streamed", quantised, tokens)
    monkeypatch.setattr("modeling.experts.ROUTED_BELOW", 2.0)
    with contextlib.closing(open_teacher(quantised, "streamed", 5, 5)) as teacher:
        assert teacher.weights.routed
    assert_equal(by("streamed", quantised, tokens), whole_blocks)


@every_form
@pytest.mark.parametrize("engine", ENGINES)
def test_it_is_to_the_bit_the_model_that_holds_what_the_stored_weights_stand_for(
    form: str, engine: str, tmp_path: Path
) -> None:
    quantised, plain = write(FORMS[form], tmp_path)
    states, logits, tokens = whole(plain)
    assert_equal(by(engine, quantised, tokens), (states, logits))
    assert logits[0].abs().max() > 0.01


@pytest.mark.parametrize("form", ["fp8, one scale", "fp8, experts", "fp8, powers of two", "mxfp4"])
@pytest.mark.parametrize("engine", ENGINES)
def test_it_is_to_the_bit_what_transformers_dequantises(
    form: str, engine: str, tmp_path: Path
) -> None:
    """Which it does for these by itself where there is no GPU."""
    quantised, _ = write(FORMS[form], tmp_path)
    states, logits, tokens = whole(quantised)
    assert_equal(by(engine, quantised, tokens), (states, logits))


# --- what is read, kept and told -------------------------------------------------------------


@every_form
def test_a_block_is_read_as_small_as_it_is_stored_and_once(form: str, tmp_path: Path) -> None:
    quantised, plain = write(FORMS[form], tmp_path)
    read, sizes = [], []
    for folder, count in ((quantised, 1), (quantised, 5), (plain, 1)):
        with contextlib.closing(open_teacher(folder, "streamed", 8, 8)) as teacher:
            passage = teacher.passage([torch.arange(8, 16)[None]] * count)
            for _ in passage.run():
                pass
            list(read_answers(passage, 4))
            reader = teacher.weights.reader
        read.append(reader.bytes_read)
        places = [place for block in range(4) for place in reader.parts[block].values()]
        sizes.append(sum(place.size for place in places))
    assert read[0] == read[1] >= sizes[0]
    assert sizes[0] < 0.8 * sizes[2]


@every_form
def test_what_is_not_quantised_stays_as_it_is_stored(form: str, tmp_path: Path) -> None:
    quantised, plain = write(FORMS[form], tmp_path)
    checkpoint, config = open_packed(read_checkpoint(quantised), read_config(quantised), BF16)
    expected = load_file(plain / "model.safetensors")
    places = {name: checkpoint.tensors[name] for name in expected}
    for name, place in places.items():
        assert isinstance(place, Packed) == name.endswith(FORMS[form].ends), name
        assert (place.shape, place.dtype) == (tuple(expected[name].shape), BF16), name
    assert not hasattr(config, "quantization_config")
    assert stored_places(places).items() <= read_checkpoint(quantised).tensors.items()


@every_form
def test_it_is_described_by_what_it_stands_for_and_how_it_is_stored(
    form: str, tmp_path: Path
) -> None:
    quantised, plain = (describe(folder) for folder in write(FORMS[form], tmp_path))
    assert quantised.quantised == FORMS[form].shown and plain.quantised is None
    assert quantised.parameters == plain.parameters
    assert (quantised.blocks, quantised.model_class) == (plain.blocks, plain.model_class)
    assert plain.types == "bfloat16 100%"
    assert any(kind in quantised.types for kind in ("uint8 ", "int8 ", "float8_e4m3fn "))


def test_memory_counts_what_is_read_and_what_it_is_unpacked_to(tmp_path: Path) -> None:
    for form, copies in (("nested nf4", 1), ("fp8, experts", 3)):  # unpacked, stacked, joined
        quantised, plain = write(FORMS[form], tmp_path / form)
        packed, _ = open_packed(read_checkpoint(quantised), read_config(quantised), BF16)
        (block,) = ([n for n in packed.tensors if f".layers.{i}." in n] for i in [1])
        fused = {name for name in block if ".experts." in name}
        found = need_of(packed, [block], fused, (), BF16, 8, 100, 32, 128)
        logical = read_checkpoint(plain).tensors
        unpacked = [name for name in block if packed.is_packed(name) and name not in fused]
        outside = [n for n in packed.tensors if packed.is_packed(n) and n not in block]
        size = sum(logical[name].size for name in unpacked + outside)
        joined = sum(logical[name].size for name in fused)
        stored = sum(packed.tensors[name].size for name in block)
        assert found.blocks == 2 * stored + size + copies * joined
        assert found.weights == sum(place.size for place in logical.values()) + 2 * joined


# --- refused ---------------------------------------------------------------------------------

NAME = "model.layers.2.self_attn.q_proj.weight"
EXPERTS = "model.layers.2.mlp.experts.down_proj"
STATE = f"{NAME}.quant_state.bitsandbytes__nf4"
MISSING = [
    ("fp8", f"{NAME}_scale_inv", f"'{NAME}' is torch.float8_e4m3fn, .* it has no scales"),
    ("fp8", NAME, f"'{NAME}_scale_inv' is part of .* lacks '{NAME}', which"),
    ("compressed, by rows", f"{NAME}_scale", f"'{NAME}' is torch.float8_e4m3fn, .* no scales"),
    ("int8", NAME.replace("weight", "SCB"), f"'{NAME}' is torch.int8, .* it has no scales"),
    ("nf4", f"{NAME}.absmax", f"'{NAME}' is torch.uint8, which .* it has no scales"),
    ("nf4", f"{NAME}.quant_map", f"'{NAME}' is part of .* lacks '{NAME}.quant_map', which"),
    ("nf4", STATE, f"lacks '{STATE}', which it takes to unpack it"),
    ("nested nf4", f"{NAME}.nested_absmax", f"'{NAME}.absmax' is torch.uint8 .*not the .* bytes"),
    ("nested nf4", f"{NAME}.nested_quant_map", f"lacks '{NAME}.nested_quant_map'"),
    ("mxfp4", f"{EXPERTS}_scales", f"lacks '{EXPERTS}_scales', which it takes"),
    ("mxfp4", f"{EXPERTS}_blocks", f"'{EXPERTS}_scales' is torch.uint8, .* it has no scales"),
]
WRONG = [
    ("fp8", f"{NAME}_scale_inv", torch.ones(3, 2), r"of \(3, 2\), not \(2, 2\) for a weight"),
    ("fp8", f"{NAME}_scale_inv", torch.ones(2, 2, dtype=torch.int32), "int32 .*not torch.float32"),
    ("fp8", f"{NAME}_scale_inv", torch.ones(2, 2, dtype=torch.uint8), "uint8 .*not torch.float32"),
    ("fp8", NAME, torch.ones(32, 32, dtype=torch.int8), "int8 .*not a matrix of torch.float8_e4m3"),
    (
        "fp8, one scale",
        f"{NAME}_scale_inv",
        torch.ones(32, 1),
        r"\(32, 1\), not \(1, 1\) or \(1,\)",
    ),
    ("compressed, by rows", f"{NAME}_scale", torch.ones(31, 1), r"\(31, 1\), not \(32, 1\) or"),
    ("compressed, by rows", f"{NAME}_zero_point", torch.ones(32, 1), "zero points are not read"),
    ("int8", NAME.replace("weight", "SCB"), torch.ones(33), r"\(33,\), not \(32, 1\) or \(32,\)"),
    ("int8", f"{NAME}_format", torch.tensor(2, dtype=torch.uint8), "not 0, row by row"),
    ("nf4", f"{NAME}.absmax", torch.ones(15), r"\(15,\), not the 64 bytes of \(32, 32\) in nf4"),
    ("nf4", f"{NAME}.quant_map", torch.ones(15), r"\(15,\), not the 64 bytes"),
    ("nf4", NAME, torch.ones(511, 1, dtype=torch.uint8), r"\(511, 1\), not the 512 bytes"),
    ("nf4", STATE, torch.ones(9, dtype=torch.uint8), "not JSON of sizes that bitsandbytes has"),
    ("mxfp4", f"{EXPERTS}_scales", torch.ones(4, 32, 3, dtype=torch.uint8), r"of \(4, 32, 2\)"),
    ("mxfp4", f"{EXPERTS}_blocks", torch.ones(4, 32, 2, 8, dtype=torch.uint8), "columns / 32, 16"),
]


def change(folder: Path, name: str, tensor: Tensor | None) -> None:
    state = load_file(folder / "model.safetensors")
    state.pop(name, None)
    save(state if tensor is None else {**state, name: tensor}, folder)


@pytest.mark.parametrize(("form", "name", "message"), MISSING, ids=lambda v: v[:50])
def test_a_tensor_that_is_missing_is_named(
    form: str, name: str, message: str, tmp_path: Path
) -> None:
    folder, _ = write(FORMS[form], tmp_path)
    change(folder, name, None)
    with pytest.raises(BadCheckpoint, match=message):
        open_teacher(folder, "auto", 8, 8)


@pytest.mark.parametrize(("form", "name", "tensor", "message"), WRONG)
def test_a_tensor_that_does_not_fit_is_named_with_what_it_is(
    form: str, name: str, tensor: Tensor, message: str, tmp_path: Path
) -> None:
    folder, _ = write(FORMS[form], tmp_path)
    change(folder, name, tensor)
    with pytest.raises(BadCheckpoint, match=f"'{name}' is .*{message}"):
        open_teacher(folder, "auto", 8, 8)


@pytest.mark.parametrize("method", ["gptq", "awq", "quanto", "modelopt", None])
def test_another_method_is_refused_by_name_before_anything_is_read(
    method: str | None, tmp_path: Path
) -> None:
    folder, _ = write(FORMS["fp8"], tmp_path)
    settle(folder, {"quant_method": method, "bits": 4})
    with pytest.raises(ValueError, match=f"quantised with '{method}', .*read are fp8, .* mxfp4"):
        open_teacher(folder, "auto", 8, 8)


COMPRESSED = FORMS["compressed, by rows"].settings
OTHERS = [
    {"format": "pack-quantized"},
    {"format": "nvfp4-pack-quantized"},
    {"quantization_status": "frozen"},
    {"sparsity_config": {"format": "sparse-24-bitmask"}},
    {"transform_config": {"config_groups": {"R1": {}}}},
]


@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_another_format_of_compressed_tensors_is_refused(other: dict, tmp_path: Path) -> None:
    folder, _ = write(FORMS["compressed, by rows"], tmp_path)
    settle(folder, COMPRESSED | other)
    with pytest.raises(ValueError, match="of compressed-tensors is read when .* as it was before"):
        open_teacher(folder, "auto", 8, 8)


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
def test_a_model_that_cannot_be_streamed_is_refused_when_it_is_quantised(
    engine: str, tmp_path: Path
) -> None:
    folder, _ = write(replace(FORMS["fp8"], family="qwen4_exp_text"), tmp_path)
    with pytest.raises(CannotStream, match=f"and not be quantised, as {folder} is"):
        open_teacher(folder, engine, 8, 8)


@pytest.mark.parametrize("form", ["fp8", "int8", "nf4", "mxfp4"])
def test_packed_weights_without_a_word_of_it_in_the_configuration_are_refused(
    form: str, tmp_path: Path
) -> None:
    folder, _ = write(FORMS[form], tmp_path)
    settle(folder, None)
    with pytest.raises(BadCheckpoint, match="has to be unpacked, but config.json states no"):
        open_teacher(folder, "auto", 8, 8)
