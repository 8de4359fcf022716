"""Answer prompts with a model that may call tools: sample, stop at a call, run it, go on.

    engine = Engine(model, tokenizer, tools)
    for group in engine.answer(prompts, candidates=4, sampling):    # token ids in, answers out
        ...

1. Prompts are read, once each, and shared by their candidates.
2. Each step, every row gets one token, drawn by a random number of its own.
3. A row whose text now has a complete call waits; the calls of all rows are run together, the
   results are inserted, and read in the step after.
4. Rows that ended are dropped, so the others get faster.

With an AdapterBank, each prompt may have an adapter of its own, or a weighted mix, and all are
decoded together (runtime/adapters).

Models like Llama on a CPU are decoded from a packed copy of their weights (packed_model.py), which
is as old as the last `refresh`; all others through transformers (any_model.py). `Engine.path` says
which, and why.

What is promised: the same call gives the same answers to the bit. A row's random numbers do not
depend on other rows; its logits do in their last bits, since matrix products of other sizes round
in another order. So with other rows beside it a row is the same unless two choices are as close
as rounding.
"""

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling.router import Router
from runtime.adapters.bank import AdapterBank
from runtime.adapters.routing import Routing
from runtime.adapters.rows import Choice, Mix, weights_of
from runtime.generation.answers import Answer, Row, Sampling
from runtime.generation.any_model import CachedSession
from runtime.generation.drawing import draw
from runtime.generation.packed_model import NotPackable, PackedModel
from runtime.generation.packed_session import PackedSession
from runtime.generation.sessions import Session
from runtime.tools.calls import RESULT, BadCall, Call, ToolResult, find_call, write_result

ROWS_AT_ONCE = 64  # more are decoded after one another


class Toolbox(Protocol):
    """What the engine needs of tools; runtime/tools/dispatch.py has the real ones."""

    def run_all(self, calls: list[Call | BadCall]) -> list[ToolResult]:
        """The calls' results, in order."""


class Engine:
    """Decodes a model."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tools: Toolbox | None = None,
        *,
        half_weights: bool = True,
        rows_at_once: int = ROWS_AT_ONCE,
        bank: AdapterBank | None = None,
        router: Router | None = None,
    ) -> None:
        """half_weights: see packed_model.py. rows_at_once: bounds memory and the size of a step.

        bank: what `answer` takes adapters from. router: chooses between them, where it is asked to.
        Raises ValueError for either that is of another model, and for a router without a bank.
        """
        if hasattr(model, "get_base_model"):  # PEFT's wrapper
            model = model.get_base_model()
        self.model, self.tokenizer, self.tools = model, tokenizer, tools
        if bank is not None and bank.model is not model:
            raise ValueError("the bank holds adapters of another model than the engine's")
        if router is not None and bank is None:
            raise ValueError("a router chooses between the adapters of a bank; give one, too")
        self._rows_at_once, self._bank = rows_at_once, bank
        self._routing = None if router is None else Routing(router, bank, tokenizer)
        self._ends = end_tokens(model, tokenizer)
        text = model.config.get_text_config()
        self.context: int | None = getattr(text, "max_position_embeddings", None)
        self._packed: PackedModel | None = None
        try:
            self._packed = PackedModel(model, half_weights)
            self.path = self._packed.description
        except NotPackable as reason:
            self.path = f"through transformers' own cache: {reason}"

    @property
    def routes(self) -> bool:
        """Whether there is a router to choose adapters by."""
        return self._routing is not None

    def refresh(self) -> None:
        """Pack the model's weights again, after they have changed; adapters must be merged."""
        if self._packed is not None:
            self._packed.refresh()

    @torch.no_grad()  # not inference mode: what a model keeps for itself must stay trainable
    def answer(
        self,
        prompts: Sequence[list[int]],
        candidates: int,
        sampling: Sampling,
        adapters: Sequence[Choice] | Literal["routed"] | None = None,
    ) -> list[list[Answer]]:
        """Write some candidates for each prompt (token ids): [prompt][candidate].

        adapters: one a prompt: a name of the bank, weights by name, or None for the model as it is;
        those taken are the same for the whole call. Or "routed": the router chooses, and answers
        say what. Raises ValueError, naming the prompt, for one that is empty or fills the model's
        context, and what `AdapterBank.take` does.
        """
        self._check(prompts, candidates)
        routing = self._asked(adapters)
        mixes = None if routing else self._take(adapters, len(prompts))
        by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        together = max(1, self._rows_at_once // candidates)  # similar lengths, so little waiting
        answers: dict[tuple[int, int], Answer] = {}
        training = self.model.training
        self.model.eval()  # dropout would be in the generic path
        try:
            for first in range(0, len(prompts), together):
                indices = by_length[first : first + together]
                if mixes is not None:
                    indices = side_by_side(indices, mixes)
                for row in self._decode(prompts, indices, candidates, sampling, mixes, routing):
                    answers[row.prompt, row.candidate] = self._answer_of(row)
        finally:
            self.model.train(training)
        return [[answers[p, c] for c in range(candidates)] for p in range(len(prompts))]

    def _check(self, prompts: Sequence[list[int]], candidates: int) -> None:
        if candidates < 1:
            raise ValueError(f"candidates is {candidates}; it must be 1 or more")
        for index, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"prompt {index} is empty; there is nothing to go on from")
            if self.context is not None and len(prompt) >= self.context:
                raise ValueError(
                    f"prompt {index} has {len(prompt)} tokens; the model's context is "
                    f"{self.context}, so at most {self.context - 1} leave room for an answer"
                )

    def _asked(self, adapters: Sequence[Choice] | str | None) -> Routing | None:
        """The router, if that is what adapters are to come from."""
        if adapters != "routed":
            return None
        if self._routing is None:
            raise ValueError("there is no router to choose adapters by; open the engine with one")
        return self._routing

    def _take(self, adapters: Sequence[Choice] | None, prompts: int) -> list[Mix] | None:
        """What each prompt's rows get, from the bank; None where none gets anything."""
        if adapters is None:
            return None
        if len(adapters) != prompts:
            raise ValueError(f"there are {len(adapters)} adapters for {prompts} prompts; one each")
        chosen = [weights_of(choice) for choice in adapters]
        names = {name: None for weights in chosen for name in weights}
        if not names:
            return None
        if self._bank is None:
            raise ValueError(f"there is no bank to take adapters {', '.join(names)} from")
        held = self._bank.take(names)
        return [tuple((held[name], w) for name, w in weights.items()) for weights in chosen]

    def _decode(
        self,
        prompts: Sequence[list[int]],
        indices: list[int],
        candidates: int,
        sampling: Sampling,
        mixes: list[Mix] | None,
        routing: Routing | None,
    ) -> list[Row]:
        """All answers to some of the prompts, decoded together."""
        own = None if mixes is None else [mixes[index] for index in indices]
        session = self._open([prompts[index] for index in indices], candidates, own, routing)
        decisions = session.decisions or [None] * len(indices)
        rows = [
            Row(index, candidate, room=self._room(prompts[index]), decision=decision)
            for index, decision in zip(indices, decisions, strict=True)
            for candidate in range(candidates)
        ]
        every = list(rows)
        ready, logits = session.start()
        while True:
            uniforms = [rows[place].uniform(sampling.seed) for place in ready]
            drawn = draw(logits, uniforms, sampling.temperature, sampling.top_p)
            fed: list[list[int]] = [[] for _ in rows]
            for place, token, log_prob in zip(ready, *drawn, strict=True):
                rows[place].write(token, log_prob, sampling, self._ends)
                fed[place].append(token)
            for place, inserted in self._use_tools(rows, ready, sampling):
                fed[place] += inserted
            if ended := [place for place in ready if rows[place].finished]:
                if len(ended) == len(rows):
                    return every
                order = session.drop(ended)
                rows, fed = [rows[place] for place in order], [fed[place] for place in order]
            ready, logits = session.step(fed)

    def _open(
        self,
        prompts: list[list[int]],
        candidates: int,
        mixes: list[Mix] | None,
        routing: Routing | None,
    ) -> Session:
        if self._packed is not None:
            return PackedSession(self._packed, prompts, candidates, mixes, routing)
        return CachedSession(self.model, prompts, candidates, mixes, routing)

    def _room(self, prompt: list[int]) -> int:
        """Tokens that fit behind a prompt; any number where the model has no longest context."""
        return 2**31 if self.context is None else self.context - len(prompt)

    def _use_tools(
        self, rows: list[Row], ready: list[int], sampling: Sampling
    ) -> list[tuple[int, list[int]]]:
        """Run the calls that the newest tokens completed: places, and what is inserted there."""
        calling = []
        for place in ready if self.tools is not None else ():
            row = rows[place]
            call = None if row.finished else self._new_call(row)
            if call is not None and len(row.calls) == sampling.max_calls:
                row.finished = "calls"
            elif call is not None:
                calling.append((place, call))
        if not calling:
            return []
        results = self.tools.run_all([call for _, call in calling])
        inserted = []
        for (place, call), result in zip(calling, results, strict=True):
            rows[place].calls.append((call, result))
            text = write_result(result)
            tokens = self.tokenizer.encode(text, add_special_tokens=False)
            rows[place].insert(tokens)
            inserted.append((place, tokens))
        return inserted

    def _new_call(self, row: Row) -> Call | BadCall | None:
        """The call that is complete since the last result, if any; a forged result is noted."""
        text = self.tokenizer.decode(row.tokens[row.watched :])
        call = find_call(text)
        if call is not None and call.text == RESULT:
            row.forged, row.watched = True, len(row.tokens)
            return None
        return call

    def _answer_of(self, row: Row) -> Answer:
        shown = row.tokens[:-1] if row.finished == "eos" else row.tokens
        return Answer(
            tokens=row.tokens,
            own=row.own,
            log_probs=row.log_probs,
            text=self.tokenizer.decode(shown),
            calls=row.calls,
            finished=row.finished,
            forged=row.forged,
            decision=row.decision,
        )


def side_by_side(indices: list[int], mixes: list[Mix]) -> list[int]:
    """Prompts with the same adapters behind one another: their rows need no gathering then."""
    places: dict[Mix, int] = {}
    return sorted(indices, key=lambda index: places.setdefault(mixes[index], len(places)))


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end an answer: the generation config's and the tokenizer's."""
    configured = model.generation_config.eos_token_id
    several = configured if isinstance(configured, list) else [configured]
    return frozenset(int(t) for t in (*several, tokenizer.eos_token_id) if t is not None)
