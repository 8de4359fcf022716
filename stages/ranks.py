"""The processes that train one student together: data parallel, each on its share of the rows.

Every one of them does the same, with its own rows of each batch; gradients are averaged, and what
is decided (a batch refused, training taken back, a stop) is decided from values that all have in
common, so that they never part. The first one alone writes. All are on one machine: the others
read its checkpoints.

`accelerate launch` starts them (stages/launch.py); its PartialState joins them, by NCCL on GPUs,
one each, and by gloo on a CPU. A process alone is a group of one, in which nothing of this happens.
"""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

Value = TypeVar("Value")


def announced() -> tuple[int, int]:
    """This process's number and how many there are, by what its launcher says; (0, 1) alone."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class Ranks:
    """A group of one process; see `Joined` for several."""

    index, count = 0, 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes."""
        return self.index == 0

    def share(self, rows: int) -> slice:
        """This process's part of so many rows, which `count` divides."""
        each = rows // self.count
        return slice(self.index * each, (self.index + 1) * each)

    def average(self, tensors: "Sequence[Tensor]") -> None:
        """Replace float32 tensors of one device by their means over all processes."""

    def copy_from_lead(self, tensors: "Sequence[Tensor]") -> None:
        """Replace tensors by those of the first process."""

    def sums(self, values: list[float]) -> list[float]:
        """The sum of each value over all processes, in float64."""
        return values

    def of_lead(self, value: Value) -> Value:
        """The first process's value."""
        return value

    def leave(self) -> None:
        """Part, when all is done."""

    def means(self, values: list[float]) -> list[float]:
        """The mean of each value over all processes."""
        return [value / self.count for value in self.sums(values)]

    def any(self, flag: bool) -> bool:
        """Whether it is so in at least one process."""
        return self.sums([float(flag)])[0] > 0


ALONE = Ranks()


class Joined(Ranks):
    """Several processes. Each method is to be called by all of them, in the same order."""

    def __init__(self) -> None:
        """Wait for the others. Raises ValueError where there are fewer GPUs than processes."""
        import torch
        from accelerate import PartialState

        (_, count), gpus = announced(), torch.cuda.device_count()
        if 0 < gpus < count:
            raise ValueError(
                f"{count} processes were asked for, but there are {gpus} GPUs here and each needs "
                f"one of its own; set 'processes' to {gpus} or less"
            )
        self._state = PartialState(cpu=gpus == 0)
        self.index, self.count = self._state.process_index, self._state.num_processes

    def average(self, tensors: "Sequence[Tensor]") -> None:
        """In one all-reduce, of all tensors in one buffer."""
        import torch
        from torch import distributed

        flat = torch.cat([tensor.flatten() for tensor in tensors])
        distributed.all_reduce(flat)
        flat /= self.count
        parts = flat.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def copy_from_lead(self, tensors: "Sequence[Tensor]") -> None:
        """One broadcast a tensor."""
        from torch import distributed

        for tensor in tensors:
            distributed.broadcast(tensor.data, src=0)

    def sums(self, values: list[float]) -> list[float]:
        """By one all-reduce."""
        import torch
        from torch import distributed

        found = torch.tensor(values, dtype=torch.float64, device=self._state.device)
        distributed.all_reduce(found)
        return found.tolist()

    def of_lead(self, value: Value) -> Value:
        """Pickled and broadcast."""
        from accelerate.utils import broadcast_object_list

        box: list[Any] = [value]
        broadcast_object_list(box)
        return box[0]

    def leave(self) -> None:
        """End the process group."""
        self._state.destroy_process_group()


def join_ranks() -> Ranks:
    """The group of processes that this one was started in."""
    return Joined() if announced()[1] > 1 else ALONE
