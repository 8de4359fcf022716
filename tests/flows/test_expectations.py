"""What a first run is expected to take, and what later ones are."""

import json
from pathlib import Path

import pytest

import flows.expectations as module
from flows.expectations import LEDGER, WITHOUT_UNITS, expectations, note_usage, slowness
from flows.plan import Node

PARAMS = {"preset": "small", "pipeline": {"expected": {"seed": {"seconds": 90, "gib": 2.0}}}}


@pytest.fixture
def cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cpuinfo"
    path.write_text("flags : fpu avx2 fma\n")
    monkeypatch.setattr(module, "CPU", path)
    monkeypatch.setattr(module, "GPU", tmp_path / "nvidia0")
    monkeypatch.setattr(module.platform, "machine", lambda: "x86_64")
    return path


@pytest.mark.parametrize("unit", ["amx_bf16", "avx512_bf16"])
def test_a_cpu_without_units_for_bfloat16_is_expected_to_be_slow(cpu: Path, unit: str) -> None:
    assert slowness() == WITHOUT_UNITS
    cpu.write_text(f"flags : fpu avx2 fma {unit}\n")
    assert slowness() == 1


def test_a_gpu_makes_up_for_the_cpu(cpu: Path) -> None:
    module.GPU.touch()
    assert slowness() == 1


def test_a_system_that_does_not_tell_its_cpu_is_taken_for_a_usual_one(cpu: Path) -> None:
    cpu.unlink()
    assert slowness() == 1


def test_what_a_stage_took_here_counts_as_it_is(tmp_path: Path, cpu: Path) -> None:
    node = Node("seed", "seed", "", "", (), (), False, "artifacts/seed", "metrics/seed.json")
    assert expectations(tmp_path, PARAMS, [node])["seed"]["time"] == "~ 6 min 00 s"
    last = tmp_path / "scratch" / "seed" / "last"
    last.mkdir(parents=True)
    (last / "result.json").write_text(json.dumps({"measured": {"peak_memory_gib": 1.25}}))
    note_usage(tmp_path, "small", "seed", 42.04)
    known = expectations(tmp_path, PARAMS, [node])["seed"]
    assert known == {"seconds": 42.0, "time": "42 s", "memory": "1.2 GiB"}
    assert not (tmp_path / LEDGER).with_suffix(".part").exists()
