"""Layer streaming (the seeds' SLI): a data set goes through a model, one block of it in memory.

Layer-wise offloaded inference with the loops turned round. AirLLM and accelerate read all weights
for every batch; here every batch is taken through block 0, then every batch through block 1, so the
weights are read once whatever the size of the data set:

    for each block:                       # read from disk while the block before it computes
        for each batch:
            run the batch's own forward on, up to the next block

A batch's forward is the model's own code, suspended at every block boundary (greenlets). So masks,
rotary embeddings, sliding windows, states that travel beside the hidden state and whatever else a
forward does between its blocks are the model's own, for any architecture. A model whose forward
visits its blocks more than once, or in another order, is followed there: that only costs reads.

Letters: B rows, T tokens a row, D hidden width, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, MutableMapping, MutableSequence, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from greenlet import greenlet
from torch import Tensor, nn
from transformers import PreTrainedModel

from modeling.refusals import refuse_unlike
from modeling.stubs import stand_ins

if TYPE_CHECKING:
    from modeling.weights import Weights

SHARED = (MutableMapping, MutableSequence)  # what blocks could leave for each other
# where a forward stands: before the output head, right behind a block, in it before its experts
HEAD, BEHIND, EXPERTS = -2, -3, -4


class NotFinite(ValueError):
    """NaN or infinity came out of a block; the message says whose fault it is."""


@dataclass(frozen=True)
class Arrival:
    """One batch has come out of one block; block -1 stands for the embedding."""

    block: int
    batch: int
    hidden: Tensor  # (B, T, D)


class Forward(greenlet):
    """One batch's forward, which stops before and behind each block that it comes to.

    at: the block it stands before, BEHIND one, in one before its EXPERTS, at the HEAD, or None at
    its end.  hidden: what the last block gave.  chosen: the experts it waits for.
    normed: what the head gets, when it stands there.  output: the model's, at its end.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        super().__init__(lambda: model(**inputs))
        self.inputs = inputs
        self.at: int | None = None
        self.done = -1  # the last block that is behind it
        self.skip = -1  # the last block that is not to be run
        self.visits: list[
            int
        ] = []  # the blocks called so far; some models call one twice, or never
        self.done_call = 0  # the one that `done` was
        self._replaced: tuple[int, Tensor] | None = None
        self.hidden: Tensor | None = None
        self.chosen: Tensor | None = None  # (tokens, k)
        self.normed: Tensor | None = None
        self.output: Any = None
        self.plain = True  # each block gets the very tensor that the one before gave
        self.width = 0  # of the tuple that blocks return; 0 for a bare tensor
        self.alike = True  # all return the same kind of thing
        self._beside: tuple = ()  # the rest of that tuple

    def advance(self, *given: Tensor) -> None:
        """Run on to the next stop, or to the end."""
        value = self.switch(*given)
        self.at, self.output = (None, value) if self.dead else (value, None)

    def restore(self, done: int, hidden: Tensor | None, width: int) -> None:
        """Before the first advance: run no block up to `done`, whose output is `hidden`.

        None for `hidden`: nor later, when the model comes back to one of them.
        """
        self.done = self.skip = done
        self.hidden, self.width = hidden, width

    def finish(self, logits: Tensor) -> Any:
        """Run on from the head, which gave these logits, to the end; gives the model's output."""
        self.advance(logits)
        return self.output

    def replace(self, call: int, output: Tensor) -> None:
        """Before the first advance: give `output` at a call instead of what the block gives.

        It is run nevertheless: others may need what it leaves for them. What it gives beside the
        hidden state comes from the block before, as if it were not there.
        """
        self._replaced = call, output

    def through_block(self, index: int, original: Callable, args: tuple, kwargs: dict) -> Any:
        """Stand in for a block's forward."""
        given = args[0] if args else kwargs.get("hidden_states")
        self.visits.append(index)
        if index <= self.skip:
            if index == self.skip and self.hidden is not None:
                self.skip, given = -1, self.hidden  # a model may come back to a block
            return (given, *[None] * (self.width - 1)) if self.width else given
        if self.done >= 0:
            self.plain &= given is self.hidden
        else:
            self.hidden = given
        self.plain &= index == self.done + 1
        self.plain &= not any(isinstance(value, SHARED) for value in kwargs.values())
        self.parent.switch(index)
        output = original(*args, **kwargs)
        if self._replaced and len(self.visits) == self._replaced[0]:
            output = self._instead_of(output)
        width = len(output) if isinstance(output, (tuple, list)) else 0
        self.alike &= type(output) in (tuple, Tensor) and (self.done < 0 or width == self.width)
        self.width = width
        self.plain &= type(output) in (tuple, Tensor)
        self.plain &= all(value is None for value in output[1:]) if self.width else True
        self.hidden = output[0] if self.width else output
        self._beside = tuple(output[1:]) if self.width else ()
        self.done, self.done_call = index, len(self.visits)
        self.parent.switch(BEHIND)
        return output

    def _instead_of(self, output: Any) -> Any:
        _, hidden = self._replaced
        if not isinstance(output, (tuple, list)):
            return hidden
        beside = len(output) - 1
        return (hidden, *(self._beside if len(self._beside) == beside else [None] * beside))

    def through_experts(
        self, module: nn.Module, original: Callable, hidden: Tensor, chosen: Tensor, *rest: Tensor
    ) -> Tensor:
        """Stand in for the forward of a block's experts: wait until those chosen are there."""
        self.chosen = chosen
        chosen = self.parent.switch(EXPERTS)
        count = module.num_experts
        module.num_experts = next(module.parameters()).shape[0]
        try:
            return original(hidden, chosen, *rest)
        finally:
            module.num_experts = count

    def at_head(self, normed: Tensor) -> Tensor:
        """Stand in for the output head: keep what it was given, and wait."""
        self.normed = normed
        return self.parent.switch(HEAD)


class Passage:
    """A data set on its way through a model."""

    def __init__(
        self, model: PreTrainedModel, blocks: Sequence[nn.Module], weights: "Weights",
        batches: Sequence[Mapping[str, Any]],
    ) -> None:  # fmt: skip
        """batches: keyword arguments of the model's forward, one mapping a batch."""
        self.model = model
        self.blocks = blocks
        self.weights = weights
        self.forwards = [Forward(model, inputs) for inputs in batches]

    @torch.no_grad()
    def run(self) -> Iterator[Arrival]:
        """Take all batches up to the head, telling of each block and batch as it is done.

        Afterwards each forward has `normed`, or `output` where there is no linear head.
        """
        experts = self.weights.routed.values()
        with stand_ins(self.blocks, linear_head(self.model), experts):
            for number, forward in enumerate(self.forwards):
                forward.advance()
                if forward.at == 0:
                    self._refuse_nan(-1, forward.hidden)
                    yield Arrival(-1, number, forward.hidden)
            while waiting := {f.at for f in self.forwards} - {None, HEAD}:
                block = min(waiting)
                self.weights.enter(block)
                try:
                    yield from self._advance(block, block)
                    while chosen := [f.chosen for f in self.forwards if f.at == EXPERTS]:
                        ids = self.weights.bring_experts(block, chosen)
                        yield from self._advance(block, EXPERTS, ids)
                finally:
                    self.weights.leave(block)

    def _advance(self, block: int, at: int, given: Sequence[Tensor] = ()) -> Iterator[Arrival]:
        """Run each batch that stands at a place on, to the next block or to the block's experts.

        given: what each of them waits for.
        """
        waiting = iter(given)
        for number, forward in enumerate(self.forwards):  # branches may be added meanwhile
            if forward.at == at:
                forward.advance(*([next(waiting)] if given else []))
                if forward.at == BEHIND:
                    self._refuse_nan(block, forward.hidden)
                    yield Arrival(block, number, forward.hidden)
                    forward.advance()

    def _refuse_nan(self, block: int, hidden: Tensor) -> None:
        """Raise NotFinite, naming the tensors that are to blame."""
        if torch.isfinite(hidden).all():
            return
        source = self.blocks[block] if block >= 0 else self.model.get_input_embeddings()
        named = source.named_parameters()
        bad = [name for name, t in named if not t.is_meta and not torch.isfinite(t).all()]
        blame = f"its {', '.join(bad)} hold NaN or infinity: the checkpoint is damaged"
        raise NotFinite(
            f"what {f'block {block}' if block >= 0 else 'the embedding'} of "
            f"{type(self.model).__name__} gives is not finite; "
            + (blame if bad else f"its weights are, so the states overflow in {hidden.dtype}")
        )

    def after_head(self) -> Callable[[Tensor], Tensor]:
        """What the model does to the head's logits (caps, scales): (n, V') -> (n, V').

        It is the model's own code, run on one token with no block. Raises CannotFollow.
        """
        refuse_unlike(self)

        def finish(logits: Tensor) -> Tensor:
            with stand_ins(self.blocks, linear_head(self.model)):
                return self._without_blocks().finish(logits[None]).logits[0]

        return finish

    def visits(self) -> list[int]:
        """The blocks that a forward comes to; to be called while it runs. Raises CannotFollow."""
        refuse_unlike(self)
        return self._without_blocks().visits

    def _without_blocks(self) -> Forward:
        """A forward of one token that came to the head through no block."""
        whole = self.forwards[0].inputs
        forward = Forward(self.model, {**whole, "input_ids": whole["input_ids"][:1, :1]})
        forward.restore(len(self.blocks) - 1, None, self.forwards[0].width)
        forward.advance()
        return forward

    def branch(self, batch: int, block: int, output: Tensor) -> Forward:
        """Add a forward that goes as a batch's does, but gets `output` out of a block.

        To be called while the passage runs, when the batch is behind that block. Where a hidden
        state tells all, nothing before the block is computed again.
        """
        origin = self.forwards[batch]
        if origin.done != block:
            raise ValueError(f"batch {batch} is behind block {origin.done}, not behind {block}")
        forward = Forward(self.model, origin.inputs)
        if origin.plain:
            forward.restore(block, output, origin.width)
        else:
            forward.replace(origin.done_call, output)
        self.forwards.append(forward)
        forward.advance()
        return forward

    def rejoin(self, batch: int) -> None:
        """Add a place for a branch of a batch; `restore` says where it is."""
        self.forwards.append(Forward(self.model, self.forwards[batch].inputs))

    @property
    def can_restore(self) -> bool:
        """Whether a batch's place in the model is told by its hidden state alone."""
        return all(forward.plain for forward in self.forwards)

    def snapshot(self) -> dict[str, Tensor]:
        """Where each batch is, to be given to `restore`; empty when that cannot be told."""
        if not self.can_restore or any(forward.hidden is None for forward in self.forwards):
            return {}
        done = [forward.done for forward in self.forwards]
        states = {f"hidden.{n}": forward.hidden for n, forward in enumerate(self.forwards)}
        return {"done": torch.tensor(done), "width": torch.tensor(self.forwards[0].width), **states}

    def restore(self, snapshot: Mapping[str, Tensor]) -> None:
        """Go on from a snapshot; to be called before `run`."""
        for number, forward in enumerate(self.forwards):
            done, width = int(snapshot["done"][number]), int(snapshot["width"])
            given = next(v for v in forward.inputs.values() if isinstance(v, Tensor))
            forward.restore(done, snapshot[f"hidden.{number}"].to(given.device), width)


def linear_head(model: PreTrainedModel) -> nn.Linear | None:
    """The output head where it is a plain linear layer, else None."""
    head = model.get_output_embeddings()
    return head if type(head) is nn.Linear else None
