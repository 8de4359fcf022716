"""Serving's memory: each part is the real tensors' bytes, and what does not fit is refused."""

import ctypes
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from modeling.checkpoint import BadCheckpoint
from modeling.memory import WillNotFit
from modeling.serving_memory import (
    FIRST_ROOM,
    INSERTED_AT_ONCE,
    PREFILLED_AT_ONCE,
    ServedAdapter,
    ServedModel,
    ServingNeed,
    require_free,
    require_tier,
    served_adapter,
    served_model,
    serving_need,
    what_fits,
)
from registry.catalog import lookup, names
from registry.records import Tier
from runtime.generation import packed_session
from runtime.generation.packed_model import PackedModel
from runtime.generation.packed_session import PackedSession
from runtime.generation.products import packing_for
from tests.tiny import tiny_gpt2, tiny_llama, tiny_mamba

F32, BF16 = torch.float32, torch.bfloat16
MIB = 1 << 20
MODEL = ServedModel(
    folder=Path("student"), dtype=F32, weights=400 * MIB, file=200 * MIB, packed=300 * MIB,
    tokenizer=40 * MIB, token=36 << 10, activations=40 << 10, heads=9, vocabulary=1000,
    longest=8192, shares_memory=True,
)  # fmt: skip
NEED = ServingNeed(
    MODEL, context=2048, answer_tokens=64, rows=4, before=300 * MIB,
    adapters=tuple(ServedAdapter(f"a{n}", 16, 15 * MIB) for n in range(8)),
)  # fmt: skip
CORE = Tier("core", memory_gb=8, max_rank=256, context=2048, description="")


def saved(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def an_adapter(folder: Path, rank: int, dtype: torch.dtype = F32) -> Path:
    folder.mkdir()
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {
        f"{layer}.lora_A.weight": torch.zeros(rank, 32, dtype=dtype),
        f"{layer}.lora_B.weight": torch.zeros(32, rank, dtype=dtype),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


# --- real bytes ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_weights_are_those_of_the_opened_model_a_tied_embedding_once(
    make, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = make()
    found = served_model(saved(model, tmp_path), dtype, None, True)
    assert found.weights == sum(p.numel() for p in model.parameters()) * dtype.itemsize
    assert found.file == (tmp_path / "model.safetensors").stat().st_size


@pytest.mark.parametrize(("answer", "steps"), [(1, 0), (65, 64), (66, 65), (100, 99)])
def test_keys_and_values_are_those_of_a_packed_session(
    answer: int, steps: int, tmp_path: Path
) -> None:
    model = tiny_llama()
    need = serving_need(
        saved(model, tmp_path), F32, context=20 + answer, answer_tokens=answer, rows=2,
        packing="float16",
    )  # fmt: skip
    with torch.no_grad():
        session = PackedSession(PackedModel(model, False), [[1] * 20, [2] * 20], 1)
        for _ in range(steps):
            session.step([[3], [4]])
    assert need.keys_and_values == sum(kept.nbytes for kept in session._prompts + session._behind)


def test_a_models_own_cache_has_the_bytes_that_are_planned(tmp_path: Path) -> None:
    model = tiny_gpt2()
    need = serving_need(saved(model, tmp_path), F32, context=20, answer_tokens=4, rows=2)
    cache = model(torch.ones(2, 20, dtype=torch.long), use_cache=True).past_key_values
    assert need.keys_and_values == sum(x.nbytes for y in cache.layers for x in (y.keys, y.values))


def test_a_packed_copy_is_filled_up_to_whole_blocks_and_other_paths_have_none(
    tmp_path: Path,
) -> None:
    folder = saved(tiny_llama(blocks=2), tmp_path)  # width 32, 64 neurons, 97 tokens
    a_block = 512 * (64 + 32 + 128 + 32) * 2
    assert served_model(folder, F32, "float16", True).packed == 2 * a_block + 512 * 112 * 2
    assert served_model(folder, F32, "onednn", True).packed == 4 * (2 * 32 * 288 + 97 * 32)
    assert served_model(folder, F32, "plain", True).packed == 0
    assert served_model(folder, F32, None, True).packed == 0
    with pytest.raises(ValueError, match="packing 'int3' is unknown; there are float16"):
        served_model(folder, F32, "int3", True)


@pytest.mark.skipif(packing_for(F32, True) != "float16", reason="FBGEMM is not there")
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="it takes glibc >= 2.33")
def test_the_packed_copy_takes_the_memory_that_is_planned(tmp_path: Path) -> None:
    model = tiny_llama(width=64, vocab=4000)
    planned = served_model(saved(model, tmp_path), F32, "float16", True).packed
    warm = PackedModel(model, True)
    before = allocated_bytes()
    packed = PackedModel(model, True)
    assert allocated_bytes() - before == pytest.approx(planned, rel=0.02)
    assert packed.description == warm.description


class MallocInfo(ctypes.Structure):
    """What glibc's mallinfo2 gives: bytes, and numbers of chunks."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost",
        )
    ]  # fmt: skip


def allocated_bytes() -> int:
    """What this process has of malloc."""
    ask = ctypes.CDLL(None).mallinfo2
    ask.restype = MallocInfo
    found = ask()
    return found.uordblks + found.hblkhd


def test_a_model_not_like_llama_has_no_packed_copy(tmp_path: Path) -> None:
    assert served_model(saved(tiny_gpt2(), tmp_path), F32, "float16", True).packed == 0


@pytest.mark.parametrize("stored", [F32, BF16])
def test_an_adapter_is_counted_in_the_type_that_is_computed_in(
    stored: torch.dtype, tmp_path: Path
) -> None:
    found = served_adapter(an_adapter(tmp_path / "sums", 8, stored), F32)
    assert found == ServedAdapter("sums", 8, 2 * 8 * 32 * 4)


def test_the_sizes_of_the_engine_are_the_engines() -> None:
    own = packed_session.FIRST_ROOM, packed_session.PREFILLED_AT_ONCE
    assert (FIRST_ROOM, PREFILLED_AT_ONCE) == own
    assert INSERTED_AT_ONCE == packed_session.INSERTED_AT_ONCE


def test_the_highest_point_is_loading_or_serving_whichever_is_higher() -> None:
    rest = NEED.before + NEED.process + MODEL.weights
    assert NEED.total == rest + NEED.serving > rest + MODEL.file
    large = replace(NEED, model=replace(MODEL, file=9 << 30))
    assert large.total == rest + (9 << 30)


def test_on_a_gpu_neither_libraries_nor_the_mapped_file_are_in_its_memory() -> None:
    there = replace(NEED, model=replace(MODEL, shares_memory=False, packed=0))
    assert there.process == 0
    assert there.total == there.before + MODEL.weights + there.serving


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_what_a_gpu_holds_already_is_asked_of_torch(tmp_path: Path) -> None:
    folder = saved(tiny_llama(), tmp_path)
    held = torch.zeros(MIB, device="cuda")
    need = serving_need(folder, F32, context=20, answer_tokens=4, rows=1, device="cuda")
    assert need.before >= held.nbytes


def test_the_table_has_a_line_for_each_part_and_their_sum() -> None:
    lines = NEED.table().splitlines()
    sizes = [float(line.split()[-2]) for line in lines]
    assert lines[-1].startswith("at the most")
    assert sum(sizes[:-1]) == pytest.approx(sizes[-1], abs=0.005)


# --- refusals --------------------------------------------------------------------------------


def test_a_need_that_fits_is_handed_back_at_the_context_of_the_tier() -> None:
    assert require_tier(replace(NEED, context=100), CORE).context == CORE.context
    short = replace(NEED, model=replace(MODEL, longest=512))
    assert require_tier(short, CORE).context == 512


def test_memory_is_enforced_to_the_byte() -> None:
    free = NEED.total - NEED.before
    assert require_free(NEED, free) is NEED
    with pytest.raises(WillNotFit):
        require_free(NEED, free - 1)


def test_a_refusal_says_both_numbers_and_what_would_fit_which_then_does() -> None:
    budget = NEED.total - 100 * MIB
    with pytest.raises(WillNotFit) as refusal:
        require_free(NEED, budget - NEED.before)
    text = str(refusal.value)
    assert f"takes {NEED.total / 2**30:.3f} GiB" in text
    assert f"{budget / 2**30:.3f} GiB. What would fit: a context of at most" in text
    assert "keys and values, 4 x 2048 tokens" in text
    context = int(text.split("a context of at most ")[1].split()[0])
    rows = int(text.split("or at most ")[1].split()[0])
    adapters = int(text.split("or the first ")[1].split()[0])
    for one, more in (
        (replace(NEED, context=context), replace(NEED, context=context + 1)),
        (replace(NEED, rows=rows), replace(NEED, rows=rows + 1)),
        (replace(NEED, adapters=NEED.adapters[:adapters]),
         replace(NEED, adapters=NEED.adapters[: adapters + 1])),
    ):  # fmt: skip
        assert one.total <= budget < more.total


def test_where_no_single_change_helps_that_is_said() -> None:
    least = replace(NEED, context=NEED.answer_tokens + 1, rows=1, adapters=())
    assert "lower context, rows and adapters together" in what_fits(NEED, least.total)
    said = what_fits(NEED, least.total - 1)
    assert said.startswith("Nothing would fit: one row of 65 tokens without adapters takes")


def test_a_tier_that_is_too_small_is_named() -> None:
    with pytest.raises(WillNotFit, match=r"tier 'core' has 0\.931 GiB"):
        require_tier(NEED, replace(CORE, memory_gb=1))


def test_an_adapter_above_the_rank_of_the_tier_is_refused_and_one_at_it_is_not() -> None:
    at = replace(NEED, adapters=(ServedAdapter("sums", 256, MIB),))
    above = replace(NEED, adapters=(ServedAdapter("sums", 257, MIB),))
    require_tier(at, CORE)
    with pytest.raises(WillNotFit, match="'sums' has rank 257; tier 'core' allows 256 at most"):
        require_tier(above, CORE)


def test_a_plan_that_does_not_fit_is_refused_with_weights_that_could_not_be_loaded(
    tmp_path: Path,
) -> None:
    """Headers say 4 TiB, in a file without data but of that length: nothing of it is read."""
    folder = saved(tiny_llama(), tmp_path)
    file = folder / "model.safetensors"
    header = b'{"model.layers.0.mlp.up_proj.weight":{"dtype":"F32","shape":[1048576,1048576],'
    header += b'"data_offsets":[0,4398046511104]}}'
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    with file.open("r+b") as stream:
        stream.truncate(8 + len(header) + (1 << 42))
    need = serving_need(folder, F32, context=64, answer_tokens=8, rows=1)
    for refuse in (lambda: require_free(need), lambda: require_tier(need, CORE)):
        with pytest.raises(WillNotFit, match="Nothing would fit"):
            refuse()


def test_every_tier_of_the_registry_takes_the_need_of_a_small_student() -> None:
    for name in names("tiers"):
        require_tier(replace(NEED, rows=1), lookup("tiers", name))


@pytest.mark.parametrize("name", ["context", "answer_tokens", "rows"])
def test_sizes_below_one_are_refused(name: str, tmp_path: Path) -> None:
    sizes = {"context": 8, "answer_tokens": 2, "rows": 1, name: 0}
    with pytest.raises(ValueError, match=f"{name} is 0; it must be 1 or more"):
        serving_need(tmp_path, F32, **sizes)


def test_packed_weights_on_a_gpu_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="packing is 'float16' on cuda; weights are packed on a"):
        serving_need(
            tmp_path, F32, context=8, answer_tokens=2, rows=1, packing="float16", device="cuda"
        )


def test_a_model_without_keys_and_values_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a mamba has no attention heads"):
        served_model(saved(tiny_mamba(), tmp_path), F32, None, True)


def test_folders_without_weights_or_adapters_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match=r"no model\.safetensors"):
        serving_need(tmp_path, F32, context=8, answer_tokens=2, rows=1)
    with pytest.raises(FileNotFoundError, match="holds no adapter"):
        served_adapter(tmp_path, F32)
