"""The bank of adapters: what it reads, what it holds within its budget, and what it refuses."""

import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling.lora import open_adapted, open_merged
from modeling.moe import ExpertsShape, add_experts, save_experts
from runtime.adapters.bank import AdapterBank, AdaptersTooLarge, UnknownAdapter
from runtime.adapters.folder import CONFIG, WEIGHTS, inspect_adapter, layer_sizes
from tests.runtime.adapting import adapter_folder
from tests.tiny import tiny_llama, tiny_mamba

MAKE = partial(tiny_llama, blocks=2)
BYTES = 4 * 4 * 2 * (4 * 32 + 2 * (32 + 16) + 3 * (32 + 64))  # float32, rank 4, two blocks


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """Four adapters of equal size."""
    place = tmp_path_factory.mktemp("adapters")
    return [adapter_folder(MAKE, place / str(seed), seed) for seed in range(4)]


def bank_of(folders: list[Path], room: float = 9) -> AdapterBank:
    """A bank of adapters '0', '1', ... with room for some."""
    bank = AdapterBank(MAKE(), int(room * BYTES))
    for number, folder in enumerate(folders):
        bank.add(str(number), folder)
    return bank


def loaded(bank: AdapterBank) -> str:
    return "".join(state.name for state in bank.listing() if state.loaded)


# --- folders ---------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["lora", "rslora", "pissa"])
@pytest.mark.parametrize("make", [MAKE, tiny_mamba])
def test_an_adapter_is_what_peft_merges(make, variant: str, tmp_path: Path) -> None:
    folder = adapter_folder(make, tmp_path / "a", 0, variant)
    model, merged = make(), open_merged(make(), folder)
    adapter = inspect_adapter(folder, layer_sizes(model)).read(torch.float32, model.device)
    assert adapter.layers
    for name, layer in adapter.layers.items():
        expected = merged.get_submodule(name).weight - model.get_submodule(name).weight
        torch.testing.assert_close(
            layer.scale * (layer.down @ layer.up).T, expected, atol=1e-5, rtol=1e-4
        )


def test_an_adapter_takes_the_type_of_its_model(folders: list[Path]) -> None:
    bank = AdapterBank(MAKE().bfloat16(), BYTES)
    bank.add("half", folders[0])
    (state,) = bank.listing()
    layers = bank.take(["half"])["half"].layers.values()
    assert {t.dtype for layer in layers for t in (layer.down, layer.up)} == {torch.bfloat16}
    assert state.bytes == sum(layer.down.nbytes + layer.up.nbytes for layer in layers) == BYTES / 2


def changed(folder: Path, into: Path, tensors=None, **config) -> Path:
    """A copy of an adapter's folder with other entries in its configuration or its file."""
    into.mkdir()
    known = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    (into / CONFIG).write_text(json.dumps(known | config), encoding="utf-8")
    file = load_file(folder / WEIGHTS)
    save_file(file if tensors is None else tensors(file), into / WEIGHTS)
    return into


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "use_dora is True"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern is"),
    ],
)
def test_what_is_no_plain_lora_is_refused_by_name(
    config: dict, message: str, folders: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"no plain lora of linear layers: {message}"):
        bank_of([changed(folders[0], tmp_path / "changed", **config)])


def test_a_real_dora_adapter_and_one_with_experts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="use_dora"):
        bank_of([adapter_folder(MAKE, tmp_path / "dora", 0, "dora")])
    model = MAKE()
    shape = ExpertsShape(after_block=1, experts=2, units=4, temperature=0.7, balance=0.01)
    experts = add_experts(model, shape, torch.arange(20).view(2, 10), seed=0)
    save_experts(experts, adapter_folder(MAKE, tmp_path / "skill", 0))
    with pytest.raises(ValueError, match="holds experts beside its adapter"):
        bank_of([tmp_path / "skill"])


def test_an_adapter_of_another_model_is_refused_with_what_does_not_fit(
    folders: list[Path], tmp_path: Path
) -> None:
    wide = adapter_folder(partial(tiny_llama, blocks=2, width=64), tmp_path / "wide", 0)
    with pytest.raises(ValueError, match=r"does not fit model\.layers\.0\.mlp\.down_proj, which"):
        bank_of([wide])
    deep = adapter_folder(partial(tiny_llama, blocks=3), tmp_path / "deep", 0)
    with pytest.raises(ValueError, match=r"changes model\.layers\.2\.mlp\.down_proj.* 4 more"):
        bank_of([deep])
    with pytest.raises(ValueError, match=r"changes model\.layers.*it has backbone"):
        AdapterBank(tiny_mamba(), BYTES).add("llama", folders[0])


def test_damaged_and_missing_files_are_said_to_be(folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no adapter"):
        bank_of([tmp_path])
    torn = changed(folders[0], tmp_path / "torn")
    (torn / WEIGHTS).write_bytes((torn / WEIGHTS).read_bytes()[:-100])
    with pytest.raises(ValueError, match="is damaged"):
        bank_of([torn])
    half = changed(folders[0], tmp_path / "half", lambda file: dict(list(file.items())[1:]))
    with pytest.raises(ValueError, match=r"lora_A has the shape None, lora_B \(32, 4\)"):
        bank_of([half])
    extra = changed(folders[0], tmp_path / "extra", lambda f: f | {"x.bias": torch.ones(1)})
    with pytest.raises(ValueError, match=r"holds x\.bias; only lora_A"):
        bank_of([extra])


def test_a_model_that_carries_adapters_itself_is_refused(folders: list[Path]) -> None:
    with pytest.raises(ValueError, match="carries an adapter of PEFT's already"):
        AdapterBank(open_adapted(MAKE(), folders[0]).get_base_model(), BYTES)


# --- the budget ------------------------------------------------------------------------------


def test_the_one_used_longest_ago_makes_room_and_is_read_again(folders: list[Path]) -> None:
    bank = bank_of(folders[:3], room=3.5)
    assert loaded(bank) == "012" and bank.loaded_bytes == 3 * BYTES
    bank.take(["0"])
    bank.add("3", folders[3])
    assert loaded(bank) == "023"
    before = {state.name: state for state in bank.listing()}["1"]
    assert (before.bytes, before.rank, before.last_use, before.reads) == (BYTES, 4, None, 1)
    again = bank.take(["1"])["1"]
    assert loaded(bank) == "013" and bank.loaded_bytes <= bank.budget_bytes
    states = {state.name: state for state in bank.listing()}
    assert (states["1"].hits, states["1"].reads) == (0, 2) and states["1"].last_use is not None
    assert (states["0"].hits, states["0"].reads) == (1, 1)
    first = bank_of(folders[1:2]).take(["0"])["0"].layers
    assert all(torch.equal(again.layers[name].up, first[name].up) for name in first)


def test_adapters_taken_together_do_not_push_each_other_out(folders: list[Path]) -> None:
    bank = bank_of(folders, room=2)
    assert loaded(bank) == "23"
    assert set(bank.take(["0", "3", "0"])) == {"0", "3"}
    assert loaded(bank) == "03"
    with pytest.raises(AdaptersTooLarge, match=rf"1, 2, 3 take {3 * BYTES:,} bytes.*{2 * BYTES:,}"):
        bank.take(["1", "2", "3"])
    assert loaded(bank) == "03"


def test_an_adapter_larger_than_the_budget_is_refused_with_both_numbers(
    folders: list[Path],
) -> None:
    bank = AdapterBank(MAKE(), BYTES - 1)
    with pytest.raises(AdaptersTooLarge, match=f"takes {BYTES:,} bytes.*{BYTES - 1:,}"):
        bank.add("large", folders[0])
    assert bank.listing() == [] and bank.loaded_bytes == 0
    with pytest.raises(ValueError, match="budget_bytes is 0"):
        AdapterBank(MAKE(), 0)


def test_what_was_taken_stays_though_it_is_removed(folders: list[Path]) -> None:
    bank = bank_of(folders[:1])
    held = bank.take(["0"])["0"]
    up = {name: layer.up.clone() for name, layer in held.layers.items()}
    bank.remove("0")
    assert bank.listing() == [] and bank.loaded_bytes == 0
    assert all(torch.equal(layer.up, up[name]) for name, layer in held.layers.items())
    bank.add("0", folders[1])
    assert bank.take(["0"])["0"] is not held


def test_names_are_known_once(folders: list[Path]) -> None:
    bank = bank_of(folders[:2], room=1)
    with pytest.raises(UnknownAdapter, match="^there is no adapter 'x'; there are: 0, 1$"):
        bank.take(["0", "x"])
    assert loaded(bank) == "1"
    with pytest.raises(UnknownAdapter, match="'x'"):
        bank.remove("x")
    with pytest.raises(ValueError, match="there is an adapter '1' already"):
        bank.add("1", folders[0])


def test_threads_that_add_and_remove_leave_the_bank_whole(folders: list[Path]) -> None:
    bank = bank_of(folders[:2], room=2.5)

    def come_and_go(name: str) -> None:
        for _ in range(10):
            bank.add(name, folders[2])
            assert bank.loaded_bytes <= bank.budget_bytes
            bank.take([name, "0"])
            bank.remove(name)

    with ThreadPoolExecutor(3) as threads:
        going = [threads.submit(come_and_go, f"t{n}") for n in range(3)]
        for _ in range(20):
            assert set(bank.take(["0", "1"])) == {"0", "1"}
        for done in going:
            done.result()
    assert [state.name for state in bank.listing()] == ["0", "1"]


def test_a_rank_of_its_own_for_some_layers_is_read(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 2}
    )
    get_peft_model(MAKE(), config).save_pretrained(tmp_path)
    adapter = inspect_adapter(tmp_path, layer_sizes(MAKE())).read(
        torch.float32, torch.device("cpu")
    )
    scales = {name.rpartition(".")[2]: layer.scale for name, layer in adapter.layers.items()}
    assert scales == {"q_proj": 2, "up_proj": 4}
