"""Where a model's weights are while it runs: all in memory, or on disk and brought by blocks."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel

from modeling.checkpoint import Checkpoint, Packed, Place
from modeling.experts import find_routed
from modeling.packed import stored_places, unpack
from modeling.reading import Reader, map_file, refuse_cut, view
from modeling.skeleton import OUTSIDE, Skeleton
from modeling.staging import Staging
from modeling.streaming import linear_head

PIECE_BYTES = 64 << 20  # of the output head that are used at a time


class Weights(Protocol):
    """Brings a model's weights, a part at a time.

    routed: block -> its experts' module, where `enter` leaves the experts out.
    """

    routed: Mapping[int, nn.Module]

    def enter(self, part: int) -> None:
        """Put a block's weights in their places."""

    def bring_experts(self, block: int, chosen: Sequence[Tensor]) -> list[Tensor]:
        """Put the chosen experts (ids, a tensor a batch) of a routed block in their places.

        Gives the same choices by the numbers that the experts have now.
        """

    def leave(self, part: int) -> None:
        """Take them out again."""

    def head(self) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Give the output head by pieces of vocabulary: first token, weight (V', D), bias (V',)."""

    def whole_head(self) -> Tensor:
        """Give the output head's weight (V, D) at once."""

    def close(self) -> None:
        """Give up what is held open."""


class Resident:
    """All weights are in memory already."""

    routed: Mapping[int, nn.Module] = {}  # noqa: RUF012 (nothing writes to it)

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def enter(self, block: int) -> None:
        """Nothing to bring."""

    def bring_experts(self, block: int, chosen: Sequence[Tensor]) -> list[Tensor]:
        """They are there."""
        del block
        return list(chosen)

    def leave(self, block: int) -> None:
        """Nothing to take away."""

    def head(self) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """The head in the pieces that it would be streamed in, so that no answer differs."""
        head = linear_head(self._model)
        yield from pieces_in_memory(head.weight, head.bias)

    def whole_head(self) -> Tensor:
        """The head's weight."""
        return linear_head(self._model).weight

    def close(self) -> None:
        """Nothing to end."""


class Streamed:
    """Weights come from disk, the next part while the present one computes.

    The head is read like a block, in pieces of vocabulary; an embedding is mapped, not read, and
    costs the rows that are looked up. What else is no block (norms) is in memory. Where so few
    tokens go through together that many experts are not routed to, those are not read (experts.py).
    """

    def __init__(
        self, skeleton: Skeleton, checkpoint: Checkpoint, tokens: float = math.inf
    ) -> None:
        """tokens: of one passage; all experts are read when it is not told."""
        self.skeleton = skeleton
        self._dtype = skeleton.model.dtype
        self._experts = find_routed(skeleton, checkpoint.tensors, tokens)
        self.routed = {block: experts.module for block, experts in self._experts.items()}
        beside = {name for experts in self._experts.values() for name in experts.names}
        self._tensors = tensors_by_part(skeleton, checkpoint, beside)
        outside = self._tensors.pop(OUTSIDE, {})
        mapped = stored_places(outside)
        self._sizes = {p.file: p.file.stat().st_size for p in mapped.values()}
        filled = unpack(outside, map_tensors(mapped))
        looked_up, head = left_on_disk(skeleton, checkpoint)
        self._head = filled.get(head)
        parts = {index: stored_places(tensors) for index, tensors in self._tensors.items()}
        self._blocks = len(skeleton.blocks)
        self._pieces = pieces_on_disk(outside[head]) if head else []
        for number, piece in enumerate(self._pieces, start=self._blocks):
            parts[number] = {"head": piece}
        self._leave(looked_up, head, filled)
        skeleton.fill(filled)
        device = skeleton.device
        self.reader = Reader(parts, Staging(device) if device.type != "cpu" else None)
        self.reader.ahead(0)

    def _leave(self, looked_up: str | None, head: str | None, filled: dict[str, Tensor]) -> None:
        """Take embedding and head out of what is to be filled in."""
        skeleton, linear = self.skeleton, linear_head(self.skeleton.model)
        if looked_up:
            embedding = skeleton.model.get_input_embeddings()
            table = filled.pop(looked_up)
            skeleton.set_absent(embedding.weight)

            def look_up(ids: Tensor) -> Tensor:
                refuse_cut(self._sizes)
                found = table[ids.to(table.device)]
                return found.to(device=skeleton.device, dtype=self._dtype)

            embedding.forward = look_up
        if head in filled and skeleton.used_by(linear.weight) == [linear]:
            del filled[head]
            skeleton.set_absent(linear.weight)

    def enter(self, block: int) -> None:
        """Wait for a block, put it in place, and begin to read the next.

        Raises BadCheckpoint when a file has become shorter.
        """
        refuse_cut(self._sizes)
        if block in self.reader.parts:
            self.skeleton.fill(unpack(self._tensors[block], self.reader.get(block)))
        self.reader.ahead(block + 1)

    def bring_experts(self, block: int, chosen: Sequence[Tensor]) -> list[Tensor]:
        """Read the chosen experts and put them, and no others, in place."""
        ids, numbers = self._experts[block].number(chosen)
        self._experts[block].make_room(len(ids))
        self.skeleton.fill(self._experts[block].tensors(ids, self.reader))
        return numbers

    def leave(self, block: int) -> None:
        """Empty the block; its buffer is free for the one after the next."""
        if block in self.reader.parts:
            self.skeleton.empty(block)
            self.reader.release(block)

    def head(self) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """The head a piece at a time; a piece is valid until the next."""
        refuse_cut(self._sizes)
        head = linear_head(self.skeleton.model)
        if not self._pieces:
            yield from pieces_in_memory(head.weight, head.bias)
            return
        first = 0
        for part, piece in enumerate(self._pieces, start=self._blocks):
            weight = self.reader.get(part)["head"].to(self._dtype)
            self.reader.ahead(part + 1)
            last = first + piece.shape[0]
            try:
                yield first, weight, None if head.bias is None else head.bias[first:last]
            finally:
                self.reader.release(part)
            first = last

    def whole_head(self) -> Tensor:
        """The head's weight, mapped where it is computed in the type that it is stored in."""
        refuse_cut(self._sizes)
        if self._head is None:
            return linear_head(self.skeleton.model).weight
        return self._head.to(device=self.skeleton.device, dtype=self._dtype)

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
    skeleton: Skeleton, checkpoint: Checkpoint, but: Collection[str] = ()
) -> dict[int, dict[str, Place | Packed]]:
    """What the model uses of a checkpoint, but for some, by block and OUTSIDE."""
    return {
        part: {name: checkpoint.tensors[name] for name in names if name not in but}
        for part, names in skeleton.parts.items()
    }


def map_tensors(places: dict[str, Place]) -> dict[str, Tensor]:
    """Tensors that are paged in where they are touched; not to be written to."""
    files = {place.file: map_file(place.file) for place in places.values()}
    return {name: view(files[place.file], place, place.offset) for name, place in places.items()}


def left_on_disk(skeleton: Skeleton, checkpoint: Checkpoint) -> tuple[str | None, str | None]:
    """The checkpoint's names of the embedding and of the head, where they need not be filled in.

    That is: an embedding of the plain kind that nothing but the head shares, and a linear head,
    neither of them quantised. To be asked before anything is filled in.
    """
    head = linear_head(skeleton.model)
    if head is None:  # something may then be multiplied with the embedding
        return None, None
    embedding, looked_up = skeleton.model.get_input_embeddings(), None
    if type(embedding) is nn.Embedding and all(
        module in (embedding, head) for module in skeleton.used_by(embedding.weight)
    ):
        looked_up = skeleton.stored_name(embedding.weight)
    names = looked_up, skeleton.stored_name(head.weight)
    return tuple(None if n is None or checkpoint.is_packed(n) else n for n in names)


def pieces_in_memory(
    weight: Tensor, bias: Tensor | None
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """A head's pieces of vocabulary: first token, weight, bias."""
    for rows in split_rows(weight.shape[0], weight.nbytes):
        part = slice(rows.start, rows.stop)
        yield rows.start, weight[part], None if bias is None else bias[part]


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
