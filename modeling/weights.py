"""Where a model's weights are while it runs: all in memory, or on disk and brought by blocks."""

import mmap
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modeling.checkpoint import Checkpoint, Place
from modeling.reading import PAGE, Reader
from modeling.skeleton import OUTSIDE, Skeleton
from modeling.streaming import linear_head

PIECE_BYTES = 64 << 20  # of the output head that are used at a time


class Resident:
    """All weights are in memory already."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def enter(self, block: int) -> None:
        """Nothing to bring."""

    def leave(self, block: int) -> None:
        """Nothing to take away."""

    def head(self) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """The whole head in one piece."""
        head = linear_head(self._model)
        yield 0, head.weight, head.bias


class Streamed:
    """Weights come from disk, the next block while the present one computes.

    What is no block (embedding, norm, head) is mapped into memory, not read: an embedding costs the
    rows that are looked up, and the head one pass over its pages, which the system may drop again.
    """

    def __init__(self, skeleton: Skeleton, checkpoint: Checkpoint, past_cache: bool) -> None:
        self.skeleton = skeleton
        self.device = skeleton.model.device
        places = checkpoint.tensors
        outside = skeleton.parts.get(OUTSIDE, [])
        self._map = FileMap(places[name] for name in outside)
        skeleton.fill({name: self._map.tensor(places[name]) for name in outside})
        parts = {
            index: {name: places[name] for name in names}
            for index, names in skeleton.parts.items()
            if index != OUTSIDE
        }
        self.reader = Reader(parts, past_cache)

    def enter(self, block: int) -> None:
        """Wait for a block, put it in place, and begin to read the next."""
        if block in self.reader.parts:
            self.skeleton.fill(self.reader.get(block))
        self.reader.ahead(block + 1)

    def leave(self, block: int) -> None:
        """Empty the block; its buffer is free for the one after the next."""
        if block in self.reader.parts:
            self.skeleton.empty(block)
            self.reader.release(block)

    def head(self) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """The head a piece at a time."""
        head = linear_head(self.skeleton.model)
        rows = max(1, PIECE_BYTES // (head.weight.shape[1] * head.weight.itemsize))
        self._map.soon(head.weight)
        for first in range(0, head.weight.shape[0], rows):
            bias = None if head.bias is None else head.bias[first : first + rows]
            yield first, head.weight[first : first + rows], bias


class FileMap:
    """Tensors that lie in files and are paged in where they are touched."""

    def __init__(self, places: Iterable[Place]) -> None:
        self._maps: dict[Path, mmap.mmap] = {}
        for place in places:
            if place.file not in self._maps:
                with place.file.open("rb") as stream:  # private: writing to it changes no file
                    self._maps[place.file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)

    def soon(self, tensor: Tensor) -> None:
        """Say that all of a tensor will be read in order, if it is one of these."""
        for mapped in self._maps.values():
            start = torch.frombuffer(mapped, dtype=torch.uint8).data_ptr()
            begin = tensor.data_ptr() - start
            if 0 <= begin < len(mapped):
                begin, end = begin // PAGE * PAGE, begin + tensor.nbytes
                mapped.madvise(mmap.MADV_WILLNEED, begin, end - begin)

    def tensor(self, place: Place) -> Tensor:
        """A view of the file's bytes."""
        if not place.size:
            return torch.empty(place.shape, dtype=place.dtype)
        raw = torch.frombuffer(
            self._maps[place.file], dtype=torch.uint8, count=place.size, offset=place.offset
        )
        if raw.data_ptr() % place.dtype.itemsize:
            raw = raw.clone()
        return raw.view(place.dtype).view(place.shape)
