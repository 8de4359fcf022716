"""Memory: the engine that fits is chosen, to the byte, and the reason says the numbers."""

import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

import modeling.memory
from modeling.checkpoint import Checkpoint, Place
from modeling.memory import (
    GIB,
    RESERVE_BYTES,
    RESIDENT,
    STREAMED,
    Need,
    WillNotFit,
    choose_engine,
    free_bytes,
    need_of,
)
from tests.tiny import REPOSITORY

NEED = Need(
    weights=40 * GIB, blocks=3 * GIB, work=GIB // 2, token=1000, batch_tokens=2048, tokens=10**7
)


def places(**sizes: tuple[torch.dtype, int]) -> Checkpoint:
    """A checkpoint of vectors: name -> type and length."""
    file = Path("model.safetensors")
    return Checkpoint(
        file.parent,
        {n: Place(file, 0, c * t.itemsize, t, (c,)) for n, (t, c) in sizes.items()},
    )


# --- what is needed --------------------------------------------------------------------------

BF16, F32, F16 = torch.bfloat16, torch.float32, torch.float16


def need(checkpoint: Checkpoint, blocks: list[list[str]], fused: tuple[str, ...] = ()) -> Need:
    return need_of(
        checkpoint, blocks, fused, (), BF16, batch_tokens=8, tokens=100, width=16, vocabulary=50
    )


def test_all_weights_and_twice_the_largest_block_are_counted() -> None:
    sizes = {"head": (BF16, 70), "small": (BF16, 10), "large": (BF16, 30), "larger": (BF16, 5)}
    found = need(places(**sizes), [["small"], ["large", "larger"]])
    assert (found.weights, found.blocks) == (2 * 115, 2 * 2 * 35)
    assert found.resident - found.streamed == 2 * 115 - 2 * 2 * 35


def test_what_is_stored_in_another_type_is_counted_as_it_is_read_and_as_it_is_computed() -> None:
    found = need(places(head=(F32, 70), a=(F32, 30), b=(F32, 40), c=(F16, 5)), [["a"], ["b", "c"]])
    assert found.weights == 2 * 145
    assert found.blocks == 2 * (4 * 40 + 2 * 5) + 2 * 45 + 2 * 70


def test_what_is_packed_stays_packed() -> None:
    sizes = {"packed": (torch.int8, 30), "small": (torch.float8_e4m3fn, 10), "bias": (BF16, 4)}
    found = need(places(**sizes), [list(sizes)])
    assert (found.weights, found.blocks) == (30 + 10 + 8, 2 * 48)


def test_experts_that_are_fused_are_counted_as_they_are_stacked_and_joined() -> None:
    found = need(
        places(one=(BF16, 50), two=(BF16, 50), other=(BF16, 9)),
        [["one", "two", "other"]],
        ("one", "two"),
    )
    assert found.blocks == 2 * 2 * 109 + 2 * 2 * 100


def test_a_model_of_no_blocks_needs_none() -> None:
    assert need(places(head=(BF16, 70)), []).blocks == 0


# --- the choice ------------------------------------------------------------------------------


def test_auto_takes_the_whole_model_to_the_very_byte_at_which_it_fits() -> None:
    assert choose_engine(NEED, "auto", NEED.resident).engine == RESIDENT
    assert choose_engine(NEED, "auto", NEED.resident - 1).engine == STREAMED


@pytest.mark.parametrize("wanted", ["auto", STREAMED])
def test_streaming_goes_to_the_very_byte_at_which_a_batch_fits(wanted: str) -> None:
    plan = choose_engine(NEED, wanted, NEED.streamed)
    assert (plan.engine, plan.tokens_at_once) == (STREAMED, NEED.batch_tokens)
    with pytest.raises(WillNotFit):
        choose_engine(NEED, wanted, NEED.streamed - 1)


@pytest.mark.parametrize(("wanted", "free"), [(RESIDENT, 0), (STREAMED, 1000 * GIB)])
def test_an_engine_that_was_asked_for_is_taken(wanted: str, free: int) -> None:
    assert choose_engine(NEED, wanted, free).engine == wanted


@pytest.mark.parametrize("wanted", ["", "Auto", "vllm", "streaming"])
def test_an_unknown_engine_is_refused_and_the_known_ones_are_listed(wanted: str) -> None:
    with pytest.raises(ValueError, match=f"'{wanted}' is unknown; .* auto, resident, streamed"):
        choose_engine(NEED, wanted, GIB)


@pytest.mark.parametrize("more", [0, 1, 999, 1000, 10**6, 10**9, 10**12])
def test_as_many_tokens_go_together_as_there_is_memory_for(more: int) -> None:
    plan = choose_engine(NEED, STREAMED, NEED.streamed + more)
    assert plan.tokens_at_once == min(NEED.tokens, NEED.batch_tokens + more // NEED.token)
    used = NEED.blocks + NEED.work + RESERVE_BYTES + plan.tokens_at_once * NEED.token
    assert used <= NEED.streamed + more


def test_a_batch_larger_than_the_data_is_still_a_batch() -> None:
    few = Need(NEED.weights, NEED.blocks, NEED.work, NEED.token, batch_tokens=2048, tokens=100)
    assert choose_engine(few, STREAMED, few.streamed).tokens_at_once == 2048
    assert "1 pass of 2048 tokens" in choose_engine(few, STREAMED, few.streamed).sentence


# --- what is said ----------------------------------------------------------------------------


def gib(text: str, label: str) -> float:
    """The number behind a label."""
    return float(re.search(rf"{label} ([0-9.]+) GiB", text).group(1))


@pytest.mark.parametrize("free", [NEED.streamed, 20 * GIB, 100 * GIB])
@pytest.mark.parametrize("wanted", ["auto", RESIDENT, STREAMED])
def test_the_sentence_says_the_numbers_that_decided(wanted: str, free: int) -> None:
    plan = choose_engine(NEED, wanted, free)
    assert plan.sentence.startswith(plan.engine)
    assert gib(plan.sentence, "resident") == pytest.approx(NEED.resident / GIB, abs=0.05)
    assert gib(plan.sentence, "streamed from") == pytest.approx(NEED.streamed / GIB, abs=0.05)
    assert gib(plan.sentence, "free") == pytest.approx(free / GIB, abs=0.05)


@pytest.mark.parametrize(
    ("tokens", "passes"), [(2048, "1 pass"), (2049, "2 passes"), (9999, "5 passes")]
)
def test_the_sentence_says_how_often_the_weights_are_read(tokens: int, passes: str) -> None:
    some = Need(NEED.weights, NEED.blocks, NEED.work, NEED.token, NEED.batch_tokens, tokens)
    sentence = choose_engine(some, STREAMED, some.streamed).sentence
    assert f"{passes} of 2048 tokens" in sentence


def test_resident_says_whether_it_fits_or_was_asked_for() -> None:
    assert "the whole model fits" in choose_engine(NEED, "auto", NEED.resident).sentence
    assert "as asked" in choose_engine(NEED, RESIDENT, 0).sentence


def test_what_will_not_fit_says_what_would() -> None:
    free = NEED.streamed - 2 * GIB
    with pytest.raises(WillNotFit) as caught:
        choose_engine(NEED, "auto", free)
    said = str(caught.value)
    assert gib(said, "being read are") == pytest.approx(NEED.blocks / GIB, abs=0.005)
    batch = NEED.work + NEED.token * NEED.batch_tokens
    assert gib(said, "a batch of 2048 tokens") == pytest.approx(batch / GIB, abs=0.005)
    assert "lower batch_rows" in said
    more = gib(said, "or free")
    assert choose_engine(NEED, "auto", int(free + (more + 0.05) * GIB)).engine == STREAMED
    assert isinstance(caught.value, MemoryError)


# --- what is free ----------------------------------------------------------------------------


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for /sys/fs/cgroup, and a process in none of its groups."""
    (tmp_path / "own").write_text("")
    monkeypatch.setattr(modeling.memory, "CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(modeling.memory, "OWN_CGROUPS", tmp_path / "own")
    return tmp_path / "groups"


def limit_group(folder: Path, version: int, limit: str, usage: int, cache: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    files = ("memory.max", "memory.current", "file")
    if version == 1:
        files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache")
    (folder / files[0]).write_text(f"{limit}\n")
    (folder / files[1]).write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{files[2]} {cache}\nslab 7\n")


def test_without_limits_the_machines_memory_is_free(groups: Path) -> None:
    assert free_bytes() == pytest.approx(psutil.virtual_memory().available, rel=0.1)


LINES = {2: "0::/some/job\n", 1: "3:cpu:/x\n7:memory:/some/job\n1:name=systemd:/y\n"}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("where", ["", "some", "some/job"])
def test_the_limit_of_its_group_or_of_one_around_it_is_kept_to(
    version: int, where: str, groups: Path
) -> None:
    (groups.parent / "own").write_text(LINES[version])
    root = groups / "memory" if version == 1 else groups
    limit_group(root / "some/other", version, "7", usage=0, cache=0)
    limit_group(root / where, version, str(900 << 20), usage=500 << 20, cache=300 << 20)
    assert free_bytes() == 700 << 20  # what the page cache holds can be dropped


@pytest.mark.parametrize("version", [1, 2])
def test_the_narrowest_of_several_groups_counts(version: int, groups: Path) -> None:
    (groups.parent / "own").write_text(LINES[version])
    root = groups / "memory" if version == 1 else groups
    limit_group(root, version, str(800 << 20), usage=0, cache=0)
    limit_group(root / "some", version, str(600 << 20), usage=100 << 20, cache=0)
    limit_group(root / "some/job", version, str(700 << 20), usage=0, cache=0)
    assert free_bytes() == 500 << 20


@pytest.mark.parametrize(
    ("version", "limit"), [(2, "max"), (1, str(2**63 - 4096)), (2, str(2**62))]
)
def test_a_group_without_a_limit_limits_nothing(version: int, limit: str, groups: Path) -> None:
    (groups.parent / "own").write_text(LINES[version])
    root = groups / "memory" if version == 1 else groups
    limit_group(root / "some/job", version, limit, usage=100, cache=0)
    assert free_bytes() == pytest.approx(psutil.virtual_memory().available, rel=0.1)


def test_a_group_that_is_full_leaves_nothing_rather_than_less(groups: Path) -> None:
    (groups.parent / "own").write_text(LINES[2])
    limit_group(groups / "some/job", 2, "1000", usage=1500, cache=0)
    assert free_bytes() == 0


def test_a_system_without_groups_is_no_trouble(groups: Path) -> None:
    (groups.parent / "own").unlink()
    assert free_bytes() > 0


def test_files_that_will_be_mapped_count_only_against_a_limited_address_space() -> None:
    code = """if True:
        import resource
        from modeling.memory import free_bytes
        before = free_bytes(mapped=1 << 60)
        resource.setrlimit(resource.RLIMIT_AS, (1 << 32, 1 << 32))
        less = free_bytes() - free_bytes(mapped=1 << 20)
        print(before > 0, free_bytes(mapped=1 << 60), less >> 20)
    """
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "0", "1"]


@pytest.mark.parametrize("limit", ["RLIMIT_DATA", "RLIMIT_AS"])  # the second: ulimit -v
def test_a_limit_of_its_own_is_kept_to(limit: str) -> None:
    """A process that takes what it was told is free gets it, and fails when it takes more."""
    code = """if True:
        import mmap, resource
        from modeling.memory import free_bytes
        resource.setrlimit(resource.WHICH, (1 << 30, 1 << 30))
        free = free_bytes()
        assert (1 << 30) - (300 << 20) < free < 1 << 30, free
        part = mmap.mmap(-1, free // 2, flags=mmap.MAP_PRIVATE)
        rest = free_bytes()
        assert abs(rest - free // 2) < 8 << 20, rest
        held = mmap.mmap(-1, rest - (8 << 20), flags=mmap.MAP_PRIVATE)
        try:
            mmap.mmap(-1, 16 << 20, flags=mmap.MAP_PRIVATE)
        except OSError:
            print(free_bytes() >> 20)
    """.replace("WHICH", limit)
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) <= 16
