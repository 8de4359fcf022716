"""Read a checkpoint's tensors by parts, the next part while the present one is in use.

A thread of its own reads with plain preadv into two page-aligned buffers that are used in turn:
page-aligned, so that O_DIRECT works, and reused, so that no memory is faulted in twice. Tensors
that lie side by side in a file are read in one go, and handed out as views: nothing is copied. For
a GPU both buffers are its own, and pieces go there by way of pinned memory (staging.py).

What the page cache holds already is taken from there; the rest goes past it, with O_DIRECT where
the file system has it. That pushes nothing else out of memory, and costs 40 % of the time and a
third of the CPU of filling the cache (benchmarks/streaming.py).
"""

import contextlib
import ctypes
import mmap
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from modeling.checkpoint import BadCheckpoint, Place
from modeling.staging import PAGE, PIECE_BYTES, Staging

CPU = torch.device("cpu")
GAP_BYTES = 1 << 16  # tensors closer than this are read in one go


@dataclass(frozen=True)
class Piece:
    """What one system call reads: bytes `begin` to `end` of a file, at least `wanted` of them."""

    file: "OpenFile"
    begin: int
    end: int
    wanted: int
    at: int  # where it goes in the buffer

    def read(self, memory: memoryview) -> int:
        """Fill memory of that size; gives how many bytes came. Raises BadCheckpoint."""
        return self.file.read(memory, self.begin, self.wanted)


@dataclass(frozen=True)
class Span:
    """Neighbouring tensors of one file: bytes `begin` to `end`, both on page boundaries."""

    file: Path
    begin: int
    end: int
    last: int  # where the last tensor ends, which may be the end of the file
    at: int  # where it goes in the buffer


def plan_spans(places: Iterable[Place]) -> list[Span]:
    """Merge tensors into as few reads as there are gaps between them."""
    merged: list[list] = []
    for place in sorted(places, key=lambda place: (place.file, place.offset)):
        begin, last = place.offset // PAGE * PAGE, place.offset + place.size
        if merged and merged[-1][0] == place.file and begin - merged[-1][2] <= GAP_BYTES:
            merged[-1][2] = max(merged[-1][2], last)
        else:
            merged.append([place.file, begin, last])
    spans, at = [], 0
    for file, begin, last in merged:
        end = -(-last // PAGE) * PAGE
        spans.append(Span(file, begin, end, last, at))
        at += end - begin
    return spans


class Reader:
    """Gives parts of a checkpoint as tensors; at most two parts are in memory.

    `bytes_read` counts what came from files. Use as a context manager.
    """

    def __init__(self, parts: dict[int, dict[str, Place]], staging: Staging | None = None) -> None:
        """staging: the way to a GPU, where the tensors are to be; else they are on the CPU."""
        self.parts = parts
        self._staging = staging
        self.bytes_read = 0
        self._spans = {part: plan_spans(places.values()) for part, places in parts.items()}
        size = max([PAGE, *map(_size_of, self._spans.values())])
        self._device = staging.device if staging else CPU
        self._free = [_buffer(size, self._device) for _ in range(2)]
        self._beside = _buffer(PAGE, self._device)
        self._used: dict[int, Tensor] = {}
        self._pool = ThreadPoolExecutor(1, "reader")
        self._coming: dict[int, Future] = {}
        self._files: dict[Path, OpenFile] = {}

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the thread and close the files."""
        self._pool.shutdown(cancel_futures=True)
        if self._staging:
            self._staging.close()
        while self._files:
            self._files.popitem()[1].close()

    def ahead(self, part: int) -> None:
        """Begin to read a part, where a buffer is free for it."""
        if part in self.parts and part not in self._used and self._free:
            self._used[part] = self._free.pop()
            self._coming[part] = self._pool.submit(self._read, self._spans[part], self._used[part])

    def get(self, part: int) -> dict[str, Tensor]:
        """The tensors of a part, by name; valid until `release`."""
        self.ahead(part)
        self._coming[part].result()
        if self._staging:
            self._staging.arrive()
        spans, buffer = self._spans[part], self._used[part]
        return {name: _view(spans, buffer, place) for name, place in self.parts[part].items()}

    def read_now(self, places: dict[tuple[str, int], Place]) -> dict[tuple[str, int], Tensor]:
        """Tensors of no part, behind what is being read; valid until this is called again."""
        spans = plan_spans(places.values())
        if self._staging:
            self._staging.depart()
        if len(self._beside) < _size_of(spans):
            self._beside = torch.empty(0, dtype=torch.uint8)  # gone before the larger one comes
            self._beside = _buffer(_size_of(spans), self._device)
        self._pool.submit(self._read, spans, self._beside).result()
        if self._staging:
            self._staging.arrive()
        return {key: _view(spans, self._beside, place) for key, place in places.items()}

    def release(self, part: int) -> None:
        """Give the part's buffer back; nothing may use its tensors from here on."""
        del self._coming[part]
        if self._staging:
            self._staging.depart()
        self._free.append(self._used.pop(part))

    def _read(self, spans: list[Span], buffer: Tensor) -> None:
        if self._staging:
            self.bytes_read += self._staging.bring(self._pieces(spans), buffer)
            return
        memory = memoryview(buffer.numpy())
        for piece in self._pieces(spans):
            self.bytes_read += piece.read(memory[piece.at : piece.at + piece.end - piece.begin])

    def _pieces(self, spans: list[Span]) -> Iterator[Piece]:
        for span in spans:
            if span.file not in self._files:
                self._files[span.file] = OpenFile(span.file)
            for begin in range(span.begin, span.end, PIECE_BYTES):
                end = min(begin + PIECE_BYTES, span.end)
                at, wanted = span.at + begin - span.begin, min(end, span.last) - begin
                yield Piece(self._files[span.file], begin, end, wanted, at)


def _size_of(spans: list[Span]) -> int:
    return sum(span.end - span.begin for span in spans)


def _view(spans: list[Span], buffer: Tensor, place: Place) -> Tensor:
    """A tensor of a buffer that these spans were read into."""
    if not place.size:  # it may lie behind the last span
        return torch.empty(place.shape, dtype=place.dtype, device=buffer.device)
    span = next(
        span for span in spans if span.file == place.file and span.begin <= place.offset < span.end
    )
    return view(buffer, place, span.at + place.offset - span.begin)


def view(memory: Tensor, place: Place, at: int) -> Tensor:
    """A tensor in the bytes of a file or buffer, where they are; copied only when misaligned."""
    raw = memory[at : at + place.size]
    if len(raw) < place.size:
        raise BadCheckpoint(f"{place.file} ends before byte {at + place.size}; fetch it again")
    if raw.data_ptr() % place.dtype.itemsize:
        raw = raw.clone()
    return raw.view(place.dtype).view(place.shape)


def refuse_cut(sizes: Mapping[Path, int]) -> None:
    """Raise BadCheckpoint when a mapped file is shorter than it was.

    Touching what was cut off would end the process with SIGBUS, which nobody can catch. To be
    called right before bytes are touched; a file that is cut in between still ends it.
    """
    for path, size in sizes.items():
        if (found := path.stat().st_size) < size:
            raise BadCheckpoint(
                f"{path} has {found} bytes, and had {size} when it was opened: it was cut or "
                "written anew while it is read; fetch it again"
            )


def map_file(path: Path) -> Tensor:
    """A file's bytes, paged in where they are touched; not to be written to (see refuse_cut)."""
    if not path.stat().st_size:
        raise BadCheckpoint(f"{path} is empty; fetch it again")
    with path.open("rb") as stream:
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        return torch.frombuffer(mapped, dtype=torch.uint8)


class OpenFile:
    """A weight file, open for reads through the page cache and past it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._mapped = map_file(path)
        self._cached = os.open(path, os.O_RDONLY)
        self._tells = os.access(path, os.W_OK) or path.stat().st_uid == os.geteuid()
        self._direct: int | None = None
        with contextlib.suppress(OSError, AttributeError):  # a file or operating system without it
            self._direct = os.open(path, os.O_RDONLY | os.O_DIRECT)

    def close(self) -> None:
        """Close it."""
        os.close(self._cached)
        if self._direct is not None:
            os.close(self._direct)

    def read(self, view: memoryview, offset: int, wanted: int) -> int:
        """Fill a view that begins and ends on page boundaries, up to the file's end; gives bytes.

        Raises BadCheckpoint when there are less than `wanted`: the file has become shorter.
        """
        got = 0
        if self._direct is not None and not self._is_cached(offset, wanted):
            got = os.preadv(self._direct, [view], offset)
        while got < wanted and (more := os.preadv(self._cached, [view[got:]], offset + got)):
            got += more  # a network's file system may give less than there is
        if got < wanted:
            raise BadCheckpoint(f"{self._path} ends at byte {offset + got}; fetch it again")
        return got

    def _is_cached(self, offset: int, size: int) -> bool:
        """Whether the page cache holds all of a range; asking reads nothing.

        Of files that are neither ours nor writable, Linux says that all is cached.
        """
        if not self._tells:
            return False
        resident = ctypes.create_string_buffer(-(-size // PAGE))
        address = ctypes.c_void_p(self._mapped.data_ptr() + offset)
        failed = ctypes.CDLL(None).mincore(address, ctypes.c_size_t(size), resident)
        return not failed and all(page & 1 for page in resident.raw)


def _buffer(size: int, device: torch.device) -> Tensor:
    """A device's memory; on the CPU page-aligned, in huge pages where the system has them."""
    if device.type != "cpu":
        return torch.empty(size, dtype=torch.uint8, device=device)
    buffer = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            buffer.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(buffer, dtype=torch.uint8)
