"""Reading by parts: the very bits that are in the files, in any order, two parts at a time."""

import json
import os
import random
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import modeling.reading
from modeling.checkpoint import DTYPES as NAMES
from modeling.checkpoint import BadCheckpoint, Place, read_checkpoint
from modeling.reading import GAP_BYTES, PAGE, Reader, map_file, plan_spans, view

Parts = dict[int, dict[str, Place]]
DTYPES = (
    torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.int64,
    torch.complex64, torch.float8_e4m3fn,
)  # fmt: skip


def write_file(path: Path, tensors: dict[str, Tensor], misaligned: int = 0) -> None:
    """A safetensors file with tensors in this order, behind a header of any length."""
    kinds = {dtype: kind for kind, dtype in NAMES.items()}
    header, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        entry = {"dtype": kinds[tensor.dtype], "shape": [*tensor.shape]}
        header[name] = {**entry, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8 + misaligned)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            if tensor.numel():
                stream.write(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())


def random_tensors(count: int, chance: random.Random) -> dict[str, Tensor]:
    """Tensors of all types and of nothing, a byte or several pages."""
    tensors = {}
    for number in range(count):
        size = chance.choice([0, 1, 3, 17, 511, 4096, 4097, 20_000, 100_000])
        raw = torch.randint(0, 2, (size, 2) if number % 3 else (size,))
        tensors[f"t{number}"] = raw.to(chance.choice(DTYPES))
    return tensors


def sharded(folder: Path, tensors: dict[str, Tensor], files: int, chance: random.Random) -> None:
    """Spread tensors over several files, each header of another alignment."""
    names: list[dict[str, Tensor]] = [{} for _ in range(files)]
    for name, tensor in tensors.items():
        chance.choice(names)[name] = tensor
    for number, members in enumerate(names):
        write_file(folder / f"{number}.safetensors", members, misaligned=number)
    index = {name: f"{n}.safetensors" for n, members in enumerate(names) for name in members}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def parts_of(folder: Path, count: int, chance: random.Random) -> Parts:
    """Each tensor in one of `count` parts, or in none."""
    parts: Parts = {number: {} for number in range(count)}
    for name, place in read_checkpoint(folder).tensors.items():
        if chance.random() < 0.8:
            parts[chance.randrange(count)][name] = place
    return parts


def forget(folder: Path) -> None:
    """Take a folder's files out of the page cache."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, tensor in found.items():
        assert (tensor.dtype, tensor.shape) == (expected[name].dtype, expected[name].shape)
        same = tensor.contiguous().flatten(), expected[name].flatten()
        assert torch.equal(*(x.view(torch.uint8) if x.numel() else x for x in same)), name


@pytest.fixture(params=["cached", "not cached", "without O_DIRECT"])
def cache(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "without O_DIRECT":
        monkeypatch.delattr(os, "O_DIRECT")
    return request.param


@pytest.fixture
def one_file(tmp_path: Path) -> Parts:
    """Four parts of two tensors each, one behind the other, of 40,000 bytes each."""
    tensors = {f"t{n}": torch.randn(10_000) for n in range(8)}
    write_file(tmp_path / "model.safetensors", tensors)
    places = read_checkpoint(tmp_path).tensors
    return {n: {f"t{m}": places[f"t{m}"] for m in (2 * n, 2 * n + 1)} for n in range(4)}


# --- what is read ----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_every_part_in_any_order_is_what_the_library_loads(
    seed: int, cache: str, tmp_path: Path
) -> None:
    chance = random.Random(seed)
    tensors = random_tensors(30, chance)
    sharded(tmp_path, tensors, 3, chance)
    if cache != "cached":
        forget(tmp_path)
    parts = parts_of(tmp_path, 5, chance)
    order = [chance.randrange(5) for _ in range(12)]
    with Reader(parts) as reader:
        for part, following in zip(order, order[1:] + [99], strict=True):
            found = reader.get(part)
            reader.ahead(following)
            assert set(found) == set(parts[part])
            assert_equal(found, tensors)
            reader.release(part)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_file_as_the_library_writes_it_is_read_as_the_library_reads_it(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    tensors = {"a": torch.randn(3, 5000).to(dtype), "b": torch.ones(7).to(dtype)}
    write_file(tmp_path / "model.safetensors", tensors)
    places = read_checkpoint(tmp_path).tensors
    with Reader({0: places}) as reader:
        assert_equal(reader.get(0), load_file(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("misaligned", range(1, 8))
def test_a_misaligned_tensor_is_copied_not_refused(misaligned: int, tmp_path: Path) -> None:
    tensors = {"a": torch.randn(9), "b": torch.randn(5).double(), "c": torch.randn(3).bfloat16()}
    write_file(tmp_path / "model.safetensors", tensors, misaligned)
    places = read_checkpoint(tmp_path).tensors
    with Reader({0: places}) as reader:
        assert_equal(reader.get(0), tensors)
    mapped = map_file(tmp_path / "model.safetensors")
    assert_equal({n: view(mapped, place, place.offset) for n, place in places.items()}, tensors)


@pytest.mark.parametrize("before", [0, 1, PAGE, PAGE + 1, 3 * PAGE, 50 * PAGE])
def test_an_empty_tensor_on_any_boundary_is_empty(before: int, tmp_path: Path) -> None:
    for header in (0, 1):  # data that begin on a page, and that do not
        tensors = {"full": torch.ones(before).to(torch.int8), "none": torch.empty(0, 4)}
        write_file(tmp_path / "model.safetensors", tensors, header)
        place = read_checkpoint(tmp_path).tensors["none"]
        on_page = Place(place.file, -(-place.offset // PAGE) * PAGE, 0, place.dtype, place.shape)
        with Reader({0: {"none": place}, 1: {"none": on_page}}) as reader:
            for part in (0, 1):
                assert reader.get(part)["none"].shape == (0, 4)


def test_no_parts_at_all_are_no_trouble() -> None:
    with Reader({}) as reader:
        reader.ahead(0)
    with Reader({3: {}}) as reader:
        assert reader.get(3) == {}


def test_a_part_of_many_pieces_is_read_whole(
    one_file: Parts, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(modeling.reading, "PIECE_BYTES", 2 * PAGE)
    forget(tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    with Reader(one_file) as reader:
        for part in one_file:
            assert_equal(reader.get(part), expected)
            reader.release(part)


# --- how much is read ------------------------------------------------------------------------


def test_each_byte_is_read_once_but_for_the_pages_at_the_edges(
    one_file: Parts, cache: str, tmp_path: Path
) -> None:
    if cache != "cached":
        forget(tmp_path)
    with Reader(one_file) as reader:
        for part in one_file:
            reader.get(part)
            reader.ahead(part + 1)
            reader.release(part)
        size = 8 * 40_000
        assert size <= reader.bytes_read <= size + 2 * PAGE * len(one_file)


@pytest.mark.parametrize(("gap", "spans"), [(0, 1), (GAP_BYTES, 1), (GAP_BYTES + PAGE, 2)])
def test_only_a_small_gap_is_read_too(gap: int, spans: int, tmp_path: Path) -> None:
    sizes = {"a": PAGE * 3, "gap": gap, "b": PAGE * 5 + 1}
    tensors = {name: torch.ones(size).to(torch.int8) for name, size in sizes.items()}
    write_file(tmp_path / "model.safetensors", tensors)
    places = read_checkpoint(tmp_path).tensors
    wanted = {name: places[name] for name in ("a", "b")}
    assert len(plan_spans(wanted.values())) == spans
    with Reader({0: wanted}) as reader:
        assert_equal(reader.get(0), load_file(tmp_path / "model.safetensors"))
        size = sizes["a"] + sizes["b"] + (gap if spans == 1 else 0)
        assert size <= reader.bytes_read <= size + 2 * PAGE * spans


def test_only_two_parts_are_ever_in_memory(one_file: Parts) -> None:
    with Reader(one_file) as reader:
        reader.get(0)
        reader.get(1)
        before = reader.bytes_read
        reader.ahead(2)
        reader.ahead(3)
    assert reader.bytes_read == before


def test_buffers_are_reused_but_not_while_they_are_in_use(one_file: Parts, tmp_path: Path) -> None:
    expected = load_file(tmp_path / "model.safetensors")
    addresses = set()
    with Reader(one_file) as reader:
        for part, following in [(0, 1), (1, 2), (2, 3), (3, 0), (0, 2), (2, 1), (1, 3)]:
            found = reader.get(part)
            addresses.add(next(iter(found.values())).untyped_storage().data_ptr())
            assert_equal(reader.get(following), expected)
            assert_equal(found, expected)
            reader.release(part)
    assert len(addresses) == 2


def test_a_part_that_was_read_ahead_in_vain_does_not_block_the_others(one_file: Parts) -> None:
    with Reader(one_file) as reader:
        reader.ahead(3)
        for part in (0, 1, 2, 0, 3, 1):
            reader.get(part)
            reader.ahead(part + 1)
            reader.release(part)


# --- what goes wrong -------------------------------------------------------------------------


@pytest.mark.parametrize("left", [0, 1, 5000, 200_000])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_file_that_is_cut_while_it_is_read_is_refused(
    after: int, left: int, cache: str, one_file: Parts, tmp_path: Path
) -> None:
    with Reader(one_file) as reader:
        for part in range(after):
            reader.get(part)
            reader.release(part)
        os.truncate(tmp_path / "model.safetensors", left)
        with pytest.raises(BadCheckpoint, match=f"{tmp_path}.*(ends at byte|is empty).*fetch"):
            for part in range(after, 4):
                reader.get(part)
                reader.release(part)


def test_a_file_that_is_cut_cannot_be_mapped_as_a_whole_one(one_file: Parts) -> None:
    place = one_file[3]["t7"]
    os.truncate(place.file, place.offset + place.size - 1)
    with pytest.raises(BadCheckpoint, match=f"{place.file} ends before byte"):
        view(map_file(place.file), place, place.offset)
    os.truncate(place.file, 0)
    with pytest.raises(BadCheckpoint, match=f"{place.file} is empty"):
        map_file(place.file)


def test_a_failure_of_the_thread_reaches_the_caller_each_time_it_asks(one_file: Parts) -> None:
    one_file[0]["t0"].file.unlink()
    with Reader(one_file) as reader:
        reader.ahead(0)
        for part in (0, 0, 1):
            with pytest.raises(FileNotFoundError, match="model.safetensors"):
                reader.get(part)


def test_the_thread_and_the_files_are_gone_after_closing_however_often(one_file: Parts) -> None:
    def open_files() -> int:
        paths = Path("/proc/self/fd").iterdir()  # some may be closed by other threads meanwhile
        return sum(os.path.realpath(path) == str(one_file[0]["t0"].file) for path in paths)

    threads = set(threading.enumerate())
    reader = Reader(one_file)
    reader.get(0)
    assert len(set(threading.enumerate()) - threads) == 1 and open_files()
    reader.close()
    reader.close()
    assert set(threading.enumerate()) == threads and not open_files()


def test_a_failure_of_the_caller_ends_the_thread(one_file: Parts) -> None:
    threads = set(threading.enumerate())
    with pytest.raises(ZeroDivisionError), Reader(one_file) as reader:
        reader.ahead(0)
        _ = 1 / 0
    assert set(threading.enumerate()) == threads
