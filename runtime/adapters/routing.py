"""Let a router choose adapters from what the model makes of the prompts themselves.

The router reads the prompts' states behind some of the model's blocks (modeling/pooled_states.py).
A session that decodes has them while it reads the prompts, which it has to do anyway.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling.pooled_states import mean_state, pooled_states
from modeling.router import BadRouter, Decision, Router
from runtime.adapters.bank import AdapterBank
from runtime.adapters.rows import Mix
from runtime.prompt import request_edges


@dataclass(frozen=True)
class Routed:
    """What a router chose, a prompt each, and the adapters for it."""

    decisions: list[Decision]
    mixes: list[Mix]


class Routing:
    """A router, and the bank with the adapters that it names."""

    def __init__(
        self,
        router: Router,
        bank: AdapterBank,
        tokenizer: PreTrainedTokenizerBase,
        most: int = 1,
    ) -> None:
        """most: adapters a prompt, weighted. Raises BadRouter for one of another model."""
        width = bank.model.config.get_text_config().hidden_size
        if router.shape.width != width:
            raise BadRouter(
                f"the router reads states of width {router.shape.width}; the model's are {width}"
            )
        self._router, self._bank, self._most = router, bank, most
        self._before, self._behind = request_edges(tokenizer)

    @property
    def blocks(self) -> tuple[int, ...]:
        """Whose outputs the router reads, from 1, ascending."""
        return self._router.shape.blocks

    def pool(self, prompts: Sequence[list[int]], hidden: Sequence[Tensor]) -> Tensor:
        """What it reads of a block: (N, D), from the states (T, D) of each prompt behind it."""
        states = [mean_state(h, self._span(p)) for p, h in zip(prompts, hidden, strict=True)]
        return torch.stack(states)

    def choose(self, states: Tensor) -> Routed:
        """Choose by the pooled states (N, B, D).

        A capability whose adapter is not in the bank, for it was removed or never added, is left to
        the model as it is.
        """
        decisions = self._router.choose(states, self._most)
        held = self._bank.take_known({name for one in decisions for name in one.weights})
        mixes = [
            tuple((held[name], w) for name, w in sorted(one.weights.items()) if name in held)
            for one in decisions
        ]
        return Routed(decisions, mixes)

    def read(self, model: PreTrainedModel, prompts: Sequence[list[int]]) -> Routed:
        """The same by a pass of its own through the first blocks of any model."""
        states = [
            pooled_states(model, [prompt], [self._span(prompt)], list(self.blocks))[0]
            for prompt in prompts
        ]
        return self.choose(torch.stack(states).cpu())

    def _span(self, prompt: list[int]) -> tuple[int, int]:
        return min(self._before, len(prompt)), len(prompt) - self._behind
