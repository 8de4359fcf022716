"""Batches on the way to the device: the next one is read while this one is learnt from."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from stages.formats.targets import Batch


def feed(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches on a device, in the same order.

    For a GPU a thread reads one batch ahead into pinned memory, from where it is copied without
    waiting; a CPU has no time that this would save.
    """
    if device.type == "cpu":
        yield from batches
        return
    for batch in read_ahead(_pinned(batches, device)):
        yield send(batch, device)


def _pinned(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    for batch in batches:
        with torch.cuda.device(device):  # each thread has a current device of its own, the first
            pinned = batch.each(Tensor.pin_memory)
        yield pinned


def send(batch: Batch, device: torch.device) -> Batch:
    """A batch on a device; what is there already stays where it is."""
    return batch.each(lambda tensor: tensor.to(device, non_blocking=True))


def read_ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches, of which a thread always has the next one at hand."""
    with ThreadPoolExecutor(1, "feed") as pool:
        coming = pool.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = pool.submit(next, batches, None)
            yield batch
