"""Decode with any causal language model of transformers, through its own code and its own cache.

Every row takes exactly one token a step: a sampled one, one of a tool's result, or one of what its
prompt is longer than the shortest. So all rows are equally long at any time, nothing is ever
padded, and no model has to understand padding: a recurrent state (Mamba) works as keys and values
do. Prompts are read once each, as far as the shortest goes, and copied to their candidates.

Adapters are added to their rows by hooks on the layers that they change, which are there during a
forward pass alone: what PEFT does by `adapter_names`, with mixes, and without a second home for the
adapters' memory.
"""

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from modeling.router import Decision
from runtime.adapters.routing import Routing
from runtime.adapters.rows import Mix, RowDeltas, deltas_of
from runtime.generation.sessions import Session, of_rows

CACHES = ("past_key_values", "cache_params")  # what models call it


class CachedSession(Session):
    """Rows that are decoded by a model's own forward."""

    most_at_once = 1

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: list[list[int]],
        candidates: int,
        mixes: Sequence[Mix] | None = None,
        routing: Routing | None = None,
    ) -> None:
        """Read the prompts (token ids, none empty).

        mixes: of adapters, one a prompt. routing: chooses them first instead, in a pass of its own.
        """
        decisions: list[Decision] = []
        if routing is not None:
            routed = routing.read(model, prompts)
            decisions, mixes = routed.decisions, routed.mixes
        shortest = min(map(len, prompts))
        waiting = [prompt[shortest:] for prompt in prompts for _ in range(candidates)]
        super().__init__(waiting, mixes and of_rows(mixes, candidates))
        self._model, self.decisions = model, decisions
        self._cache: dict[str, Cache] = {}  # by the name under which the model takes it
        logits = self._forward([prompt[:shortest] for prompt in prompts], mixes)
        spread = torch.arange(len(prompts), device=logits.device).repeat_interleave(candidates)
        self._reorder(spread)
        self._first = logits[spread]

    def _first_logits(self, ready: list[int]) -> Tensor:
        return self._first[ready]

    def _feed(self, tokens: list[list[int]], ready: list[int]) -> Tensor:
        return self._forward(tokens, self._mixes)[ready]

    def _forward(self, tokens: list[list[int]], mixes: Sequence[Mix] | None) -> Tensor:
        """Logits behind the last of equally many tokens a row: (rows, V)."""
        rows = torch.tensor(tokens, device=self._model.device)
        with adding(self._model, deltas_of(mixes, list(map(len, tokens)), rows.device)):
            output = self._model(rows, use_cache=True, logits_to_keep=1, **self._cache)
        self._cache = {name: output[name] for name in CACHES if isinstance(output.get(name), Cache)}
        if not self._cache:
            kind = type(self._model).__name__
            raise ValueError(f"{kind} gives no cache of transformers' own kind to decode with")
        return output.logits[:, -1]

    def _forget(self, places: set[int]) -> list[int]:
        order = [place for place in range(len(self._waiting)) if place not in places]
        self._reorder(torch.tensor(order, dtype=torch.long, device=self._model.device))
        return order

    def _reorder(self, rows: Tensor) -> None:
        """Let the cache hold some of its rows, in an order, some perhaps several times."""
        for cache in self._cache.values():
            cache.reorder_cache(rows)


@contextlib.contextmanager
def adding(model: PreTrainedModel, deltas: RowDeltas | None) -> Iterator[None]:
    """Let a model's linear layers add what adapters do, for as long as the context lasts."""
    hooks = [
        model.get_submodule(name).register_forward_hook(partial(_add, deltas, name))
        for name in (deltas.layers if deltas is not None else ())
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _add(
    deltas: RowDeltas, name: str, layer: nn.Linear, given: tuple[Tensor], output: Tensor
) -> Tensor:
    """The result of a layer (..., F) with the adapters' on top.

    Raises ValueError for a layer that gets other tokens than the rows', as an expert does.
    """
    x, y = given[0].flatten(0, -2), output.flatten(0, -2).contiguous()
    if len(x) != deltas.tokens:
        raise ValueError(
            f"{name} is called with {len(x)} of {deltas.tokens} tokens, so it cannot be told which "
            "row each is of; adapters on it have to be merged into the weights"
        )
    deltas.add_to(y, x, ((name, 0, layer.out_features),))
    return y.view(output.shape)
