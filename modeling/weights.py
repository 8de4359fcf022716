"""Where a model's weights are while it runs: all in memory, or on disk and brought by blocks."""

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor, nn
from transformers import PreTrainedModel

from modeling.checkpoint import Checkpoint, Packed, Place
from modeling.packed import stored_places, unpack
from modeling.reading import Reader, map_file, view
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
        """The head in the pieces that it would be streamed in, so that no answer differs."""
        yield from pieces_in_memory(linear_head(self._model))

    def close(self) -> None:
        """Nothing to end."""


class Streamed:
    """Weights come from disk, the next part while the present one computes.

    The head is read like a block, in pieces of vocabulary. The rest of what is no block (embedding,
    norms) is mapped, not read: an embedding costs the rows that are looked up.
    """

    def __init__(self, skeleton: Skeleton, checkpoint: Checkpoint) -> None:
        self.skeleton = skeleton
        self._tensors = tensors_by_part(skeleton, checkpoint)
        outside = self._tensors.pop(OUTSIDE, {})
        mapped = unpack(outside, map_tensors(stored_places(outside)))
        skeleton.fill(mapped)
        parts = {index: stored_places(tensors) for index, tensors in self._tensors.items()}
        self._blocks = len(skeleton.blocks)
        head = linear_head(skeleton.model)
        stored = (n for n in outside if head is not None and same_memory(mapped[n], head.weight))
        name = next(stored, None)  # none where the head is computed in another type than stored
        place = outside.get(name)
        self._pieces = pieces_on_disk(place) if isinstance(place, Place) else []
        for number, piece in enumerate(self._pieces, start=self._blocks):
            parts[number] = {"head": piece}
        self.reader = Reader(parts)
        self.reader.ahead(0)

    def enter(self, block: int) -> None:
        """Wait for a block, put it in place, and begin to read the next."""
        if block in self.reader.parts:
            self.skeleton.fill(unpack(self._tensors[block], self.reader.get(block)))
        self.reader.ahead(block + 1)

    def leave(self, block: int) -> None:
        """Empty the block; its buffer is free for the one after the next."""
        if block in self.reader.parts:
            self.skeleton.empty(block)
            self.reader.release(block)

    def head(self) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """The head a piece at a time; a piece is valid until the next."""
        head = linear_head(self.skeleton.model)
        if not self._pieces:
            yield from pieces_in_memory(head)
            return
        first = 0
        for part, piece in enumerate(self._pieces, start=self._blocks):
            weight = self.reader.get(part)["head"]
            self.reader.ahead(part + 1)
            last = first + piece.shape[0]
            try:
                yield first, weight, None if head.bias is None else head.bias[first:last]
            finally:
                self.reader.release(part)
            first = last

    def close(self) -> None:
        """Stop reading."""
        self.reader.close()


def fill_whole(skeleton: Skeleton, checkpoint: Checkpoint) -> None:
    """Put all of a checkpoint into memory, unpacked as it is when it is streamed."""
    for tensors in tensors_by_part(skeleton, checkpoint).values():
        filled = unpack(tensors, map_tensors(stored_places(tensors)))
        plain = [name for name, place in tensors.items() if isinstance(place, Place)]
        skeleton.fill(filled | {name: filled[name].clone() for name in plain})


def tensors_by_part(
    skeleton: Skeleton, checkpoint: Checkpoint
) -> dict[int, dict[str, Place | Packed]]:
    """What the model uses of a checkpoint, by block and OUTSIDE."""
    return {
        part: {name: checkpoint.tensors[name] for name in names}
        for part, names in skeleton.parts.items()
    }


def map_tensors(places: dict[str, Place]) -> dict[str, Tensor]:
    """Tensors that are paged in where they are touched; not to be written to."""
    files = {place.file: map_file(place.file) for place in places.values()}
    return {name: view(files[place.file], place, place.offset) for name, place in places.items()}


def same_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same numbers in the same place."""
    return (one.dtype, one.shape, one.data_ptr()) == (other.dtype, other.shape, other.data_ptr())


def pieces_in_memory(head: nn.Linear) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """A head's pieces of vocabulary: first token, weight, bias."""
    for rows in split_rows(head.weight.shape[0], head.weight.nbytes):
        bias = None if head.bias is None else head.bias[rows.start : rows.stop]
        yield rows.start, head.weight[rows.start : rows.stop], bias


def pieces_on_disk(place: Place) -> list[Place]:
    """The same pieces, where they lie in a file."""
    row = place.size // place.shape[0]
    return [
        replace(
            place, offset=place.offset + rows.start * row, size=len(rows) * row,
            shape=(len(rows), *place.shape[1:]),
        )
        for rows in split_rows(place.shape[0], place.size)
    ]  # fmt: skip


def split_rows(count: int, size: int) -> list[range]:
    """Cut a matrix of so many rows and bytes into pieces of whole rows."""
    step = max(1, PIECE_BYTES * count // size)
    return [range(first, min(first + step, count)) for first in range(0, count, step)]
