"""What a checkpoint holds: the place, type and shape of every tensor, from the headers alone.

    https://huggingface.co/docs/safetensors: 8 bytes with the header's length, the header in JSON
    (name -> dtype, shape, data_offsets), then the data. A checkpoint is one such file or several.

Nothing else is opened as weights: a pickle can run any code, so it is refused.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

MAX_HEADER_BYTES = 100_000_000  # what the safetensors library allows
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
    "BOOL": torch.bool, "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


class BadCheckpoint(ValueError):
    """A checkpoint that cannot be read as it is; the message says which file and why."""


@dataclass(frozen=True)
class Place:
    """Where one tensor lies."""

    file: Path
    offset: int  # bytes from the start of the file
    size: int  # bytes
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Packed:
    """A tensor that is stored quantised, as several others (packed.py finds them)."""

    form: str  # what a person calls it: nf4, mxfp4
    stored: dict[str, Place]  # by the names that the checkpoint gives them
    unpack: Callable[..., Tensor]  # given what is stored, in that order
    dtype: torch.dtype  # of what it is unpacked to
    shape: tuple[int, ...]
    beside: tuple[str, ...] = ()  # names of what says how it is stored, and was read to know that

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(place.size for place in self.stored.values())


@dataclass(frozen=True)
class Checkpoint:
    """A folder of safetensors files."""

    folder: Path
    tensors: dict[str, Place | Packed]  # by the name that the checkpoint gives it

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(place.size for place in self.tensors.values())

    def is_packed(self, name: str) -> bool:
        """Whether a tensor is stored quantised."""
        return isinstance(self.tensors[name], Packed)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read the headers of all weight files in a folder.

    Raises BadCheckpoint for a folder without safetensors, a missing or damaged file, or a tensor
    type that torch does not have.
    """
    tensors: dict[str, Place] = {}
    for file in _weight_files(folder):
        tensors.update(read_header(file))
    return Checkpoint(folder, tensors)


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if index.is_file():
        files = _files_of(index)
        if missing := [file.name for file in files if not file.is_file()]:
            raise BadCheckpoint(
                f"{folder} lacks {', '.join(missing)}, which its index names; fetch it again"
            )
        return files
    if pickles := sorted(path.name for path in folder.glob("*.bin")):
        raise BadCheckpoint(
            f"{folder} has only pickled weights ({pickles[0]}), which can run any code and are "
            "never opened; convert them to safetensors on a machine where that does not matter"
        )
    raise BadCheckpoint(f"{folder} has no model.safetensors and no index of several")


def _files_of(index: Path) -> list[Path]:
    """The files that an index names."""
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [index.parent / name for name in sorted(set(names))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(index, "it holds no weight_map of tensors and files") from error


def read_header(file: Path) -> dict[str, Place]:
    """Where one file has which tensors. Raises BadCheckpoint for a damaged file."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise _damaged(file, f"its header would be {length} bytes of {size}")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            places = {name: _place(file, 8 + length, name, header[name]) for name in header}
        except BadCheckpoint:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _damaged(file, "its header is not that of a safetensors file") from error
    end = 8 + length
    for name, place in sorted(places.items(), key=lambda item: (item[1].offset, item[1].size)):
        if place.offset != end:  # a gap or an overlap; the safetensors library refuses them, too
            raise _damaged(file, f"tensor '{name}' begins at byte {place.offset}, not at {end}")
        end += place.size
    if end != size:
        raise _damaged(file, f"its tensors would end at byte {end} of {size}")
    return places


def _place(file: Path, start: int, name: str, entry: dict) -> Place:
    """Where a tensor lies whose header entry this is, in a file whose data begin at `start`."""
    if entry["dtype"] not in DTYPES:
        raise BadCheckpoint(f"{file}: tensor '{name}' is {entry['dtype']}, unknown to torch")
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if min(shape, default=0) < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        raise _damaged(file, f"tensor '{name}' is {dtype} of {shape}, but has {end - begin} bytes")
    return Place(file, start + begin, end - begin, dtype, shape)


def _damaged(file: Path, why: str) -> BadCheckpoint:
    return BadCheckpoint(f"{file} is damaged or cut short: {why}; fetch it again")
