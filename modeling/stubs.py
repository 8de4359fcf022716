"""Stand-ins for the forwards of a model's parts, where the forwards of batches wait.

The forward that runs (streaming.py) is the greenlet that a stand-in is called in; it is asked what
becomes of the call.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

from greenlet import getcurrent
from torch import nn


@contextlib.contextmanager
def stand_ins(
    blocks: Sequence[nn.Module], head: nn.Module | None, experts: Iterable[nn.Module] = ()
) -> Iterator[None]:
    """Put them in the place of the forwards of blocks, head and experts, and take them away."""

    def of_block(index: int, original: Callable) -> Callable:
        return lambda *args, **kwargs: getcurrent().through_block(index, original, args, kwargs)

    def of_experts(module: nn.Module, original: Callable) -> Callable:
        return lambda *args: getcurrent().through_experts(module, original, *args)

    forwards = [(block, of_block(index, block.forward)) for index, block in enumerate(blocks)]
    forwards += [(module, of_experts(module, module.forward)) for module in experts]
    if head is not None:
        forwards.append((head, lambda normed: getcurrent().at_head(normed)))
    for module, forward in forwards:
        module.forward = forward
    try:
        yield
    finally:
        for module, _ in forwards:
            del module.forward
