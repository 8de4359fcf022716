"""Which calls help: Toolformer's step 3, the filter (Schick 2023, section 2).

With w the weights of the tokens that follow a place, and L(z) = - sum_t w_t log p(x_t | z, x_<t),

    usefulness = min(L(nothing), L(call without its result)) - L(call and result)

A call is kept when that is at least a threshold: the result has to make what follows likelier than
both writing on and the mere thought of calling.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from runtime.prompt import inserted_tokens
from stages.formats.conversations import Conversation
from stages.learning.supervision import Example
from stages.toolformer.proposals import Proposal, Text, log_probs_of

FADE = 0.2  # of the weight, a token


@dataclass(frozen=True)
class Judged:
    """A proposal and the losses of what follows it, in nats."""

    proposal: Proposal
    nothing: float
    without_result: float
    with_result: float

    @property
    def usefulness(self) -> float:
        """How much likelier the result makes what follows."""
        return min(self.nothing, self.without_result) - self.with_result


def fading_weights(count: int) -> Tensor:
    """Weights of `count` following tokens: max(0, 1 - 0.2 t), normalised to 1."""
    weights = (1 - FADE * torch.arange(count)).clamp_min(0)
    return weights / weights.sum()


@torch.no_grad()
def judge(
    model: PreTrainedModel,
    texts: Sequence[Text],
    proposals: Sequence[Proposal],
    tokenizer: PreTrainedTokenizerBase,
    write_result: Callable,
    following_tokens: int,
    most_tokens: int,
) -> list[Judged]:
    """The losses of what follows each proposal: with nothing, the call, the call and its result."""
    examples = []
    for proposal in proposals:
        text, at = texts[proposal.place.text], proposal.place.token
        call = inserted_tokens(proposal.call.text, tokenizer)
        result = inserted_tokens(write_result(proposal.result), tokenizer)
        following = text.reply[at : at + following_tokens]
        for inserted in ((), call, (*call, *result)):
            before = (*text.prompt, *text.reply[:at], *inserted)
            counted = (False,) * len(before) + (True,) * len(following)
            examples.append(Example((*before, *following), counted))
    found = log_probs_of(model, examples, tokenizer.eos_token_id, most_tokens)
    losses = [-(fading_weights(len(part)) @ part).item() for part in found]
    return [
        Judged(proposal, *losses[3 * place : 3 * place + 3])
        for place, proposal in enumerate(proposals)
    ]


def keep_best(judged: Sequence[Judged], threshold: float) -> list[Judged]:
    """The most useful call of each place, where it is useful enough."""
    best: dict[tuple[int, int], Judged] = {}
    for one in judged:
        place = (one.proposal.place.text, one.proposal.place.token)
        if one.usefulness >= threshold and (
            place not in best or one.usefulness > best[place].usefulness
        ):
            best[place] = one
    return list(best.values())


def with_calls(
    texts: Sequence[Text], kept: Sequence[Judged], write_result: Callable
) -> list[Conversation]:
    """The texts that calls were kept for, with the calls and results in their places.

    The calls alone are to be learnt: what stands around them is left out of the loss. Schick counts
    it, in texts like those that the model was made from; here it would be another style of answer
    to the questions of sft, and its numbers worked out in the head.
    """
    by_text: dict[int, list[Judged]] = {}
    for one in kept:
        by_text.setdefault(one.proposal.place.text, []).append(one)
    told = []
    for number, calls in sorted(by_text.items()):
        text = texts[number]
        reply, at = text.conversation.reply, 0
        segments = [("prompt", text.conversation.prompt)]
        for one in sorted(calls, key=lambda one: one.proposal.place.token):
            start = text.starts[one.proposal.place.token]
            segments.append(("recited", reply[at:start]))
            segments.append(("own", one.proposal.call.text))
            segments.append(("result", write_result(one.proposal.result)))
            at = start
        segments.append(("recited", reply[at:]))
        source = text.conversation
        id = f"toolformer/{source.id}"
        shown = tuple(segment for segment in segments if segment[1])
        told.append(Conversation(id, source.capability, shown, source.answer, source.facts))
    return told
