"""Answer what people write, whatever it is: tidy it, cut it to what fits, route it, decode it.

    assistant = Assistant(Engine(model, tokenizer, tools, bank=bank, router=router))
    for reply in assistant.reply(["What is 15 % of 62?", "Is the fridge running?"], sampling):
        print(reply.capability, reply.text)

A request that is longer than what may be read keeps its beginning and its end, with a mark between
them: most questions stand at one of the two. Bytes that are no text become the replacement
character. An engine without a router answers by the model as it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from runtime.generation.answers import Answer, Sampling
from runtime.generation.engine import Engine
from runtime.prompt import prompt_tokens, request_edges

MOST_TOKENS = 2048  # of a request that are read
LEFT_OUT = "\n[...]\n"  # stands for what was cut out
FIRST_SHARE = 0.75  # of what stays, from the beginning


@dataclass(frozen=True)
class Reply:
    """What came of a request.

    capability: the likeliest one, whose adapter answered if the bank has it; None where the router
    abstained or there is none.  cut: whether the middle of the request was left out.
    """

    text: str
    capability: str | None
    cut: bool
    answer: Answer


class Assistant:
    """Answers texts with an engine."""

    def __init__(
        self, engine: Engine, most_tokens: int = MOST_TOKENS, most_own_tokens: int | None = None
    ) -> None:
        """most_tokens: of a request that are read.  most_own_tokens: that an answer may ask for."""
        if most_tokens < 1:
            raise ValueError(f"most_tokens is {most_tokens}; it must be 1 or more")
        self._engine, self._most, self._most_own = engine, most_tokens, most_own_tokens
        self._edges = sum(request_edges(engine.tokenizer))

    def reply(self, requests: Sequence[str | bytes], sampling: Sampling) -> list[Reply]:
        """Answer requests together, in their order.

        Raises ValueError where sampling leaves no room in the model's context for any request, and
        where it asks for longer answers than memory was planned for.
        """
        most = self._room(sampling)
        tidied = [fit(tidy(request), self._engine.tokenizer, most) for request in requests]
        prompts = [prompt_tokens(text, self._engine.tokenizer) for text, _ in tidied]
        adapters = "routed" if self._engine.routes else None
        answers = self._engine.answer(prompts, 1, sampling, adapters) if prompts else []
        return [
            Reply(answer.text, leading(answer), cut, answer)
            for [answer], (_, cut) in zip(answers, tidied, strict=True)
        ]

    def _room(self, sampling: Sampling) -> int:
        """How many tokens of a request are read."""
        if self._most_own is not None and sampling.max_own_tokens > self._most_own:
            raise ValueError(
                f"max_own_tokens is {sampling.max_own_tokens}, and memory was planned for answers "
                f"of {self._most_own} tokens; ask for fewer, or plan for more"
            )
        context = self._engine.context
        if context is None:
            return self._most
        room = context - self._edges - sampling.max_own_tokens
        if room < 1:
            raise ValueError(
                f"max_own_tokens is {sampling.max_own_tokens}, and the template takes "
                f"{self._edges} of the model's context of {context} tokens; at most "
                f"{max(0, context - self._edges - 1)} leave room for a request"
            )
        return min(self._most, room)


def tidy(request: str | bytes) -> str:
    """A request as text that every tokenizer takes: valid Unicode, without zero bytes."""
    raw = request if isinstance(request, bytes) else request.encode("utf-8", "replace")
    return raw.decode("utf-8", "replace").replace("\0", "\N{REPLACEMENT CHARACTER}")


def fit(request: str, tokenizer: PreTrainedTokenizerBase, most: int) -> tuple[str, bool]:
    """The request, without its middle where it has more than `most` tokens; and whether so."""
    tokens = _encode(request, tokenizer)
    if len(tokens) <= most:
        return request, False
    room = most - len(_encode(LEFT_OUT, tokenizer))
    while room > 0:
        first = max(1, int(FIRST_SHARE * room))
        last = tokens[len(tokens) - (room - first) :]
        text = tokenizer.decode(tokens[:first]) + LEFT_OUT + tokenizer.decode(last)
        over = len(_encode(text, tokenizer)) - most
        if over <= 0:
            return text, True
        room -= over  # text that is put together anew may have other tokens
    return tokenizer.decode(tokens[: max(1, most // 2)]), True


def leading(answer: Answer) -> str | None:
    """The likeliest capability of an answer's prompt, or None."""
    weights = answer.decision.weights if answer.decision else {}
    return max(weights, key=weights.__getitem__) if weights else None


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]
