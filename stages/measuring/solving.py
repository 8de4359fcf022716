"""Let a model solve problems whose right answers are known, with tools, and count what it wrote."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from runtime.generation.answers import Answer, Sampling
from runtime.generation.engine import Engine
from runtime.prompt import prompt_tokens
from stages.formats.answers import final_answer, same_answer
from stages.formats.conversations import Conversation


@dataclass(frozen=True)
class Solved:
    """What a model made of one problem.

    formatted: it ended by itself with one answer, and forged no result.  own_tokens: what it wrote,
    without what tools inserted.
    """

    id: str
    right: bool
    formatted: bool
    own_tokens: int
    calls: int
    operation: str
    text: str

    @classmethod
    def of(cls, problem: Conversation, answer: Answer) -> "Solved":
        """Judge an answer."""
        stated = final_answer(answer.text)
        ended = answer.finished == "eos" and not answer.forged
        return cls(
            problem.id,
            ended and same_answer(stated, problem.answer, problem.prompt),
            ended and stated is not None,
            sum(answer.own),
            len(answer.calls),
            str(problem.facts.get("operation", "")),
            answer.text,
        )


def solve(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Conversation],
    sampling: Sampling,
    at_once: int,
) -> Iterator[list[Solved]]:
    """Greedy answers to problems, some at a time, so that a stage can note how far it is."""
    for start in range(0, len(problems), at_once):
        part = problems[start : start + at_once]
        prompts = [prompt_tokens(problem.prompt, tokenizer) for problem in part]
        answers = engine.answer(prompts, 1, sampling)
        yield [Solved.of(problem, answer) for problem, (answer,) in zip(part, answers, strict=True)]
