"""Bring bytes from files to a GPU: reading, copying and computing overlap.

A ring of small pinned buffers; several threads each read a piece of a file into one and have it
copied on a stream of its own (Rhu 2016, vDNN; the double buffering of FlexGen, Sheng 2023, with
pieces in the place of layers). So the host holds some pieces of 8 MiB, not a block; a piece's slot
is read into again as soon as its copy is done.

On a CPU the same code runs without streams, which is how it is tested where there is no GPU.
"""

from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable

    from modeling.reading import Piece

PAGE = 4096
PIECE_BYTES = 8 << 20  # one system call reads at most this
SLOTS = 16  # pinned buffers
THREADS = 8  # that read; one alone copies some 5 GB/s out of the page cache, a bus takes 25 or more


class Slot:
    """A pinned buffer, aligned for O_DIRECT, and the event that its last copy is done."""

    def __init__(self, device: torch.device) -> None:
        pinned = device.type != "cpu"
        raw = torch.empty(PIECE_BYTES + PAGE, dtype=torch.uint8, pin_memory=pinned)
        first = -raw.data_ptr() % PAGE
        self.buffer = raw[first : first + PIECE_BYTES]
        self.copied = torch.get_device_module(device).Event()


class Staging:
    """The way from files to one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._api = torch.get_device_module(device)  # torch.cuda, or torch.cpu, whose streams wait
        self._stream = self._api.Stream()
        self._free: SimpleQueue[Slot] = SimpleQueue()
        for _ in range(SLOTS):
            self._free.put(Slot(device))
        self._pool = ThreadPoolExecutor(THREADS, "staging")

    def bring(self, pieces: "Iterable[Piece]", target: Tensor) -> int:
        """Read pieces and begin to copy them into `target`, a buffer on the device; gives bytes."""
        return sum(self._pool.map(lambda piece: self._bring(piece, target), pieces))

    def _bring(self, piece: "Piece", target: Tensor) -> int:
        slot = self._free.get()
        try:
            slot.copied.synchronize()
            size = piece.end - piece.begin
            got = piece.read(memoryview(slot.buffer.numpy())[:size])
            with self._api.stream(self._stream):
                target[piece.at : piece.at + size].copy_(slot.buffer[:size], non_blocking=True)
                slot.copied.record(self._stream)
        finally:
            self._free.put(slot)
        return got

    def arrive(self) -> None:
        """What is computed from now on waits for all copies begun so far."""
        self._api.current_stream(self.device).wait_stream(self._stream)

    def depart(self) -> None:
        """What is copied from now on waits for all that is computed so far."""
        self._stream.wait_stream(self._api.current_stream(self.device))

    def close(self) -> None:
        """Stop the threads; what is computed from now on waits for copies that are under way."""
        self._pool.shutdown(cancel_futures=True)
        self.arrive()
