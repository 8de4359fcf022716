"""Checkpoints: places equal what the safetensors library reads; whatever is damaged is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from modeling.checkpoint import MAX_HEADER_BYTES, BadCheckpoint, Place, read_checkpoint

FLOATS = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.float8_e8m0fnu, torch.complex64,
)  # fmt: skip
WHOLE = (
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16,
    torch.uint8, torch.bool,
)  # fmt: skip
SHARDS = {
    "model-00001-of-00002.safetensors": {"a": torch.arange(6.0).view(2, 3)},
    "model-00002-of-00002.safetensors": {"b": torch.arange(4), "c": torch.tensor(7.5)},
}


def bytes_at(place: Place) -> bytes:
    with place.file.open("rb") as stream:
        stream.seek(place.offset)
        return stream.read(place.size)


def bytes_of(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().flatten().view(torch.uint8).tolist())


def assert_places_equal_the_library(folder: Path, files: dict[str, dict[str, Tensor]]) -> None:
    checkpoint = read_checkpoint(folder)
    assert set(checkpoint.tensors) == {name for tensors in files.values() for name in tensors}
    for file in files:
        with safe_open(folder / file, "pt") as library:
            for name in library.keys():  # noqa: SIM118 (it is no mapping)
                place, expected = checkpoint.tensors[name], library.get_tensor(name)
                assert place.file == folder / file
                assert (place.dtype, place.shape) == (expected.dtype, tuple(expected.shape))
                assert place.size == expected.nbytes
                assert bytes_at(place) == (bytes_of(expected) if expected.numel() else b"")
    total = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
    assert checkpoint.size == total


def write_shards(folder: Path) -> Path:
    """Two files and their index; gives the index."""
    for file, tensors in SHARDS.items():
        save_file(tensors, folder / file)
    names = {name: file for file, tensors in SHARDS.items() for name in tensors}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return index


def write_raw(folder: Path, header: object, data: bytes = b"") -> Path:
    """A file whose header is any JSON, or these very bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file = folder / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return file


def entry(begin: int, end: int, dtype: object = "F32", shape: object = (2,)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


# --- what is there ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*FLOATS, *WHOLE], ids=str)
def test_the_places_of_every_type_are_those_that_the_library_reads(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    shapes = [(3, 5), (7,), (), (0,), (2, 0, 3), (1, 1, 4)]
    raw = [torch.randint(0, 2, shape) for shape in shapes]
    tensors = {f"t{number}": tensor.to(dtype) for number, tensor in enumerate(raw)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert_places_equal_the_library(tmp_path, {"model.safetensors": tensors})


def test_the_places_in_several_files_are_those_that_the_library_reads(tmp_path: Path) -> None:
    write_shards(tmp_path)
    assert_places_equal_the_library(tmp_path, SHARDS)


def test_metadata_is_no_tensor(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert set(read_checkpoint(tmp_path).tensors) == {"a"}


def test_a_header_may_have_any_length_and_its_tensors_any_alignment(tmp_path: Path) -> None:
    for spaces in range(9):
        header = json.dumps({"a": entry(0, 8)}).encode() + b" " * spaces
        write_raw(tmp_path, header, torch.tensor([1.5, -2.0]).numpy().tobytes())
        (place,) = read_checkpoint(tmp_path).tensors.values()
        assert bytes_at(place) == bytes_of(torch.tensor([1.5, -2.0]))


def test_one_whole_file_goes_before_an_index(tmp_path: Path) -> None:
    """As in transformers: a folder may keep an index from before its shards were merged."""
    write_shards(tmp_path)
    save_file({"whole": torch.ones(2)}, tmp_path / "model.safetensors")
    assert set(read_checkpoint(tmp_path).tensors) == {"whole"}


# --- a damaged file --------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 40, -9, -1])
def test_a_file_that_was_cut_off_is_refused_by_name(keep: int, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(8), "b": torch.ones(3, 3)}, file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(BadCheckpoint, match=f"{file} is damaged or cut short.*fetch it again"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        b"\x00\xff garbage \x80", b"{'a': 1}", b"[1, 2]", b'"text"', b"12", b"null",
        b'{"a": 3}', b'{"a": {}}', b'{"a": {"dtype": "F32", "shape": [2]}}',
    ],
)  # fmt: skip
def test_a_header_that_is_garbage_is_refused(header: bytes, tmp_path: Path) -> None:
    file = write_raw(tmp_path, header, bytes(8))
    with pytest.raises(BadCheckpoint, match=f"{file} is damaged.*not that of a safetensors file"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("length", [0, 1, 200, 2**63 - 1, 2**64 - 1, MAX_HEADER_BYTES + 1])
def test_a_header_longer_than_its_file_is_refused(length: int, tmp_path: Path) -> None:
    file = write_raw(tmp_path, {"a": entry(0, 8)}, bytes(8))
    file.write_bytes(length.to_bytes(8, "little") + file.read_bytes()[8:])
    with pytest.raises(BadCheckpoint, match=f"its header would be {length} bytes of 77"):
        read_checkpoint(tmp_path)


WRONG = {
    "fewer bytes than its shape": {"a": entry(0, 4), "b": entry(4, 12)},
    "more bytes than its shape": {"a": entry(0, 12), "b": entry(12, 20)},
    "bytes of another type": {"a": entry(0, 8, "BF16")},
    "a place behind the end": {"a": entry(0, 8), "b": entry(800, 808)},
    "a place in another's": {"a": entry(0, 8), "b": entry(4, 12)},
    "another's very place": {"a": entry(0, 8), "b": entry(0, 8)},
    "a gap before it": {"a": entry(0, 8), "b": entry(12, 20)},
    "a gap before the first": {"a": entry(4, 12)},
    "bytes behind the last": {"a": entry(0, 8)},
    "an end before its begin": {"a": entry(8, 0)},
    "a place in the header": {"a": entry(-8, 0)},
    "a negative length": {"a": entry(0, 8, shape=(-1, -2))},
    "three offsets": {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 16]}},
    "offsets that are text": {"a": entry("0", "8")},
    "a length that is text": {"a": entry(0, 8, shape=("2",))},
    "no list of lengths": {"a": entry(0, 8, shape=None)},
}


@pytest.mark.parametrize("what", WRONG)
def test_a_tensor_cannot_have(what: str, tmp_path: Path) -> None:
    """What the library refuses, too; else it would be read as wrong numbers."""
    file = write_raw(tmp_path, WRONG[what], bytes(20))
    with pytest.raises(SafetensorError), safe_open(file, "pt"):
        pass
    with pytest.raises(BadCheckpoint, match=f"{file} is damaged"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("dtype", ["F4", "F8_E5M2FNUZ", "Q4_0", "float32", "", None, 7])
def test_a_type_that_is_unknown_is_refused_by_the_tensors_name(
    dtype: object, tmp_path: Path
) -> None:
    write_raw(tmp_path, {"some.weight": entry(0, 8, dtype)}, bytes(8))
    with pytest.raises(BadCheckpoint, match=f"'some.weight' is {dtype}, unknown to torch"):
        read_checkpoint(tmp_path)


# --- a damaged folder ------------------------------------------------------------------------


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    index = write_shards(tmp_path)
    shutil.move(tmp_path / "model-00002-of-00002.safetensors", tmp_path / "elsewhere")
    with pytest.raises(BadCheckpoint, match=r"lacks model-00002-of-00002\.safetensors, which its"):
        read_checkpoint(tmp_path)
    assert index.is_file()


def test_a_shard_that_is_damaged_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path)
    file = tmp_path / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(BadCheckpoint, match=f"{file} is damaged"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "{", "<html>404</html>", "[]", "3", "{}", '{"weight_map": []}', '{"weight_map": null}',
     '{"weight_map": {"a": ["x"]}}', '{"weight_map": {"a": 1}}', "\udcff"],
)  # fmt: skip
def test_an_index_that_is_none_is_refused_by_name(text: str, tmp_path: Path) -> None:
    index = write_shards(tmp_path)
    index.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(BadCheckpoint, match=f"{index} is damaged.*weight_map"):
        read_checkpoint(tmp_path)


def write_pickle(folder: Path) -> None:
    torch.save({"a": torch.ones(2)}, folder / "pytorch_model.bin")


def write_nothing(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (write_pickle, r"only pickled weights \(pytorch_model\.bin\), which can run any code"),
        (write_nothing, r"has no model\.safetensors and no index of several"),
        (lambda folder: None, r"has no model\.safetensors and no index of several"),
        (lambda folder: (folder / "model.safetensors").mkdir(), r"has no model\.safetensors"),
    ],
)
def test_a_folder_without_safetensors_is_refused(
    write: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    write(tmp_path)
    with pytest.raises(BadCheckpoint, match=message):
        read_checkpoint(tmp_path)


def test_pickles_beside_safetensors_are_no_trouble(tmp_path: Path) -> None:
    write_pickle(tmp_path)
    write_shards(tmp_path)
    assert set(read_checkpoint(tmp_path).tensors) == {"a", "b", "c"}
