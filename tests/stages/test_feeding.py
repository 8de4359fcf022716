"""Feeding: batches come in order, a thread's error where it belongs; on a GPU if there is one."""

from collections.abc import Iterator

import pytest
import torch

from modeling.losses import SparseTargets
from stages.distill.feeding import feed, read_ahead, send
from stages.formats.targets import Batch

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
every_device = pytest.mark.parametrize("name", ["cpu", pytest.param("cuda", marks=needs_gpu)])


def batches(count: int, fails_at: int = -1) -> Iterator[Batch]:
    for number in range(count):
        if number == fails_at:
            raise ValueError(f"batch {number} is damaged")
        ids = torch.full((2, 3, 4), number)
        targets = SparseTargets(ids, ids.float(), ids[..., 0].float())
        prefix = None if number % 2 else torch.full((2, 3, 5), float(number)).bfloat16()
        yield Batch(ids[..., 0], targets, prefix, {3: torch.full((2, 3, 2), float(number))})


def parts(batch: Batch) -> list[torch.Tensor]:
    found = []
    batch.each(lambda tensor: found.append(tensor) or tensor)
    return found


@every_device
def test_batches_arrive_on_the_device_in_order_and_whole(name: str) -> None:
    device = torch.device(name)
    fed = list(feed(batches(5), device))
    assert len(fed) == 5
    for found, expected in zip(fed, batches(5), strict=True):
        assert len(parts(found)) == len(parts(expected)) == (5 if expected.prefix is None else 6)
        for one, other in zip(parts(found), parts(expected), strict=True):
            assert one.device.type == name
            assert torch.equal(one.cpu(), other)


def test_reading_ahead_gives_the_same_batches_and_is_one_ahead() -> None:
    read: list[int] = []

    def watched() -> Iterator[Batch]:
        for batch in batches(4):
            read.append(int(batch.tokens[0, 0]))
            yield batch

    ahead = read_ahead(watched())
    assert [int(batch.tokens[0, 0]) for batch in ahead] == [0, 1, 2, 3]
    assert read == [0, 1, 2, 3]
    assert list(read_ahead(iter(()))) == []


def test_what_goes_wrong_while_reading_ahead_is_told_where_the_batch_is_asked_for() -> None:
    ahead = read_ahead(batches(4, fails_at=2))
    assert int(next(ahead).tokens[0, 0]) == 0
    assert int(next(ahead).tokens[0, 0]) == 1
    with pytest.raises(ValueError, match="batch 2 is damaged"):
        next(ahead)


def test_what_is_on_the_device_already_is_not_copied() -> None:
    (batch,) = batches(1)
    assert parts(send(batch, torch.device("cpu")))[0] is batch.tokens
