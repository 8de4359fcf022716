"""Decode with any causal language model of transformers, through its own code and its own cache.

Every row takes exactly one token a step: a sampled one, one of a tool's result, or one of what its
prompt is longer than the shortest. So all rows are equally long at any time, nothing is ever
padded, and no model has to understand padding: a recurrent state (Mamba) works as keys and values
do. Prompts are read once each, as far as the shortest goes, and copied to their candidates.
"""

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from runtime.generation.sessions import Session

CACHES = ("past_key_values", "cache_params")  # what models call it


class CachedSession(Session):
    """Rows that are decoded by a model's own forward."""

    most_at_once = 1

    def __init__(self, model: PreTrainedModel, prompts: list[list[int]], candidates: int) -> None:
        """Read the prompts (token ids, none empty)."""
        shortest = min(map(len, prompts))
        super().__init__([prompt[shortest:] for prompt in prompts for _ in range(candidates)])
        self._model = model
        self._cache: dict[str, Cache] = {}  # by the name under which the model takes it
        logits = self._forward([prompt[:shortest] for prompt in prompts])
        spread = torch.arange(len(prompts), device=logits.device).repeat_interleave(candidates)
        self._reorder(spread)
        self._first = logits[spread]

    def _first_logits(self, ready: list[int]) -> Tensor:
        return self._first[ready]

    def _feed(self, tokens: list[list[int]], ready: list[int]) -> Tensor:
        return self._forward(tokens)[ready]

    def _forward(self, tokens: list[list[int]]) -> Tensor:
        """Logits behind the last of equally many tokens a row: (rows, V)."""
        rows = torch.tensor(tokens, device=self._model.device)
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
