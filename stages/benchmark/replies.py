"""What a student with adapters makes of queries whose right replies are known.

A query is scored with all adapters in one mixed batch: a row each, of the same tokens.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from modeling.blocks import dissect
from modeling.loading import open_model, open_tokenizer
from modeling.lora import open_arrow
from modeling.router import open_router
from runtime.adapters.bank import AdapterBank, AdapterState
from runtime.adapters.folder import NotPlain
from runtime.adapters.routing import Routing
from runtime.adapters.rows import Mix, deltas_of
from runtime.generation.any_model import adding
from runtime.prompt import prompt_tokens
from stages.benchmark.routing import RoutedQuery
from stages.benchmark.scoring import CHUNK_TOKENS, final_states
from stages.formats.conversations import Conversation
from stages.learning.supervision import Example, encode

NO_BUDGET = 1 << 62  # bytes: all adapters stay in memory


class RoutedStudent:
    """A student, its router, and the adapters that the router chooses between.

    without: what could not be opened, and why: adapters that sft did not teach, or that are no
    plain lora, and Arrow, where PEFT cannot build it of them.
    """

    def __init__(self, student: Path, router: Path, adapters: Path) -> None:
        """adapters: folder of folders, one a capability. Raises BadRouter, and what
        `inspect_adapter` does for an adapter that is damaged.
        """
        self._model, self._tokenizer = open_model(student), open_tokenizer(student)
        width = self._model.config.get_text_config().hidden_size
        opened = open_router(router, width)
        self.capabilities = opened.shape.capabilities
        self.without: dict[str, str] = {}
        self._bank = AdapterBank(self._model, NO_BUDGET)
        for name in self.capabilities:
            if not (adapters / name).is_dir():
                self.without[f"adapter '{name}'"] = "sft does not teach it"
                continue
            try:
                self._bank.add(name, adapters / name)
            except NotPlain as error:
                self.without[f"adapter '{name}'"] = str(error)
        self._routing = Routing(opened, self._bank, self._tokenizer)
        held = self._bank.take(self.adapters)
        every = tuple((adapter, 1 / len(held)) for adapter in held.values())
        self._mixes: list[Mix] = [(), every, *(((adapter, 1.0),) for adapter in held.values())]
        self._arrow = self._open_arrow(student, adapters)

    @property
    def adapters(self) -> dict[str, AdapterState]:
        """Those that are there, by name."""
        return {state.name: state for state in self._bank.listing()}

    def score(self, capability: str, told: Conversation) -> RoutedQuery:
        """Route a query, and score its reply with each adapter."""
        prompt = prompt_tokens(told.prompt, self._tokenizer)
        (decision,) = self._routing.read(self._model, [prompt]).decisions
        example = encode(told, self._tokenizer)
        alone, merged, *own = reply_scores(self._model, example, self._mixes)
        arrow = reply_scores(self._arrow, example, [()])[0] if self._arrow else None
        return RoutedQuery(
            capability, told.prompt, next(iter(decision.weights), None), alone, merged,
            dict(zip(self.adapters, own, strict=True)), arrow,
        )  # fmt: skip

    def _open_arrow(self, student: Path, adapters: Path) -> PreTrainedModel | None:
        try:
            return open_arrow(open_model(student), [adapters / name for name in self.adapters])
        except ValueError as error:
            self.without["Arrow"] = str(error)
            return None


@torch.no_grad()
def reply_scores(model: PreTrainedModel, example: Example, mixes: Sequence[Mix]) -> list[float]:
    """The share of a reply's counted tokens that the model names first, with each mix."""
    tokens = torch.tensor([example.tokens] * len(mixes), device=model.device)
    with adding(model, deltas_of(mixes, [len(example)] * len(mixes), model.device)):
        states = final_states(model, tokens)
    counted = torch.tensor(example.counted[1:], device=model.device)
    before, labels = states[:, :-1][:, counted], tokens[:, 1:][:, counted]
    head, hits = dissect(model).head, torch.zeros(len(mixes), device=model.device)
    for part in torch.arange(labels.shape[1]).split(max(1, CHUNK_TOKENS // len(mixes))):
        hits += (head(before[:, part]).argmax(-1) == labels[:, part]).sum(-1)
    return (hits / labels.shape[1]).tolist()
