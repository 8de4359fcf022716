"""Where a call might help, and which: Toolformer's steps 1 and 2 (Schick 2023, section 2).

A text is a request and a reply without calls. Where a number follows that nothing before it gives
away (Schick's heuristics for the calculator are of that kind, appendix A), the model is asked how
likely it would begin a call there; at the likeliest places it writes some, and they are run.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling.token_log_probs import token_log_probs
from runtime.generation.answers import Sampling
from runtime.generation.engine import Engine
from runtime.prompt import inserted_tokens, prompt_tokens
from runtime.tools.calls import Call, ToolResult, find_call
from stages.formats.conversations import Conversation
from stages.learning.number_masking import first_told
from stages.learning.supervision import Example, alike, make_rows


@dataclass(frozen=True)
class Text:
    """A conversation without calls, in tokens.

    starts: of each reply token, in characters.  numbers: reply tokens with which numbers begin that
    nothing before them gives away.
    """

    conversation: Conversation
    prompt: tuple[int, ...]
    reply: tuple[int, ...]
    starts: tuple[int, ...]
    numbers: tuple[int, ...]

    @classmethod
    def of(cls, conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> "Text":
        """Tokenise it; raises ValueError for one with a call."""
        if any(kind == "result" for kind, _ in conversation.segments):
            raise ValueError(
                f"conversation '{conversation.id}' has calls already; 'texts' are replies without"
            )
        encoded = tokenizer(
            conversation.reply, add_special_tokens=False, return_offsets_mapping=True
        )
        ends = 0, *(end for _, end in encoded["offset_mapping"])
        starts = tuple(  # some tokenizers leave the space before a word out of its offsets
            min(start, before)
            for (start, _), before in zip(encoded["offset_mapping"], ends, strict=False)
        )
        prompt = prompt_tokens(conversation.prompt, tokenizer)
        told = first_told(conversation.prompt, conversation.reply)
        numbers = tuple(bisect_right(starts, at) - 1 for at in told)
        return cls(conversation, tuple(prompt), tuple(encoded["input_ids"]), starts, numbers)

    def places(self, reach: int) -> list[int]:
        """Reply tokens with one of the numbers among the `reach` tokens from there on."""
        near = {place for at in self.numbers for place in range(max(0, at - reach + 1), at + 1)}
        return sorted(near)


@dataclass(frozen=True)
class Place:
    """Before which token of a reply a call might stand, and how likely the model begins one."""

    text: int
    token: int
    tool: str
    probability: float


@dataclass(frozen=True)
class Proposal:
    """A call at a place, and what the tool gave."""

    place: Place
    call: Call
    result: ToolResult


def opening(tool: str) -> str:
    """How a call of a tool begins."""
    return f"<<{tool}>>"


def log_probs_of(
    model: PreTrainedModel, examples: Sequence[Example], pad: int, most_tokens: int
) -> list[Tensor]:
    """The log-probabilities of each example's counted tokens, (counted,) each, in order."""
    found: dict[int, Tensor] = {}
    numbered = {id(example): place for place, example in enumerate(examples)}
    head = model.get_output_embeddings().weight
    for group in alike(examples, most_tokens):
        rows = make_rows([[example] for example in group], pad)
        tokens, counted = rows.tokens.to(model.device), rows.counted[:, 1:].to(model.device)
        hidden = model.base_model(tokens, use_cache=False).last_hidden_state[:, :-1]
        values, _ = token_log_probs(hidden[counted].to(head.dtype), head, tokens[:, 1:][counted])
        parts = values.cpu().split([sum(example.counted) for example in group])
        found |= {numbered[id(example)]: part for example, part in zip(group, parts, strict=True)}
    return [found[place] for place in range(len(examples))]


@torch.no_grad()
def find_places(
    model: PreTrainedModel,
    text: Text,
    number: int,
    tools: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    most: int,
    least: float,
    reach: int,
) -> list[Place]:
    """The `most` likeliest places of a text for each tool, of at least probability `least`.

    reach: among how many tokens behind a place the number has to begin that a call might tell. A
    place's probability is that of the whole opening, of which a forward pass gives the first
    token's; the rest of it follows almost surely in a model that was taught the form.
    """
    candidates = torch.tensor(text.places(reach), dtype=torch.long)
    if not len(candidates):
        return []
    tokens = torch.tensor([text.prompt + text.reply], device=model.device)
    hidden = model.base_model(tokens, use_cache=False).last_hidden_state[0]
    head = model.get_output_embeddings().weight
    before = hidden[len(text.prompt) - 1 + candidates].to(head.dtype)  # the state before each
    found = []
    for tool in tools:
        first = inserted_tokens(opening(tool), tokenizer)[0]
        chosen = torch.full((len(before),), first, device=model.device)
        probabilities = token_log_probs(before, head, chosen)[0].exp()
        values, places = probabilities.topk(min(most, len(probabilities)))
        found += [
            Place(number, token, tool, value)
            for value, token in zip(values.tolist(), candidates[places.cpu()].tolist(), strict=True)
            if value >= least
        ]
    return found


def propose(
    engine: Engine,
    texts: Sequence[Text],
    places: Sequence[Place],
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    tries: int,
) -> tuple[list[Proposal], int]:
    """Let the model write calls at places and run them; and how many were written at all.

    Different calls alone count, and those whose tool gave a result. sampling: without calls
    (max_calls 0), for these are run here.
    """
    prompts = []
    for place in places:
        text = texts[place.text]
        begun = inserted_tokens(opening(place.tool), tokenizer)
        prompts.append([*text.prompt, *text.reply[: place.token], *begun])
    written = 0
    wanted: list[tuple[Place, Call]] = []
    for place, answers in zip(places, engine.answer(prompts, tries, sampling), strict=True):
        calls = {}
        for answer in answers:
            call = find_call(opening(place.tool) + answer.text)
            if isinstance(call, Call):
                calls[call.text] = call
        written += len(answers)
        wanted += [(place, call) for call in calls.values()]
    results = engine.tools.run_all([call for _, call in wanted])
    return [
        Proposal(place, call, result)
        for (place, call), result in zip(wanted, results, strict=True)
        if result.ok
    ], written
