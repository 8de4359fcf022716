"""Probes: the same problems before and after, never learnt from, that decide what is kept."""

from collections.abc import Sequence
from dataclasses import dataclass

from modeling.lora import Adapted, merged
from runtime.generation.answers import Sampling
from runtime.generation.engine import Engine
from stages.formats.conversations import Conversation
from stages.measuring.forgetting import Forgetting
from stages.measuring.solving import Solved, solve
from stages.measuring.statistics import Share

AT_ONCE = 32  # problems


@dataclass(frozen=True)
class Probe:
    """How a model does on the probes, answered greedily.

    step: of training, when it was asked.  own_tokens: written an answer, on average.
    """

    step: int
    right: list[bool]
    own_tokens: float

    @classmethod
    def of(cls, step: int, solved: Sequence[Solved]) -> "Probe":
        """From what was solved."""
        own = sum(one.own_tokens for one in solved) / len(solved)
        return cls(step, [one.right for one in solved], own)

    @property
    def share(self) -> Share:
        """How many are right."""
        return Share(sum(self.right), len(self.right))


def ask(
    engine: Engine,
    adapted: Adapted,
    problems: Sequence[Conversation],
    step: int,
    max_own_tokens: int,
    max_calls: int,
) -> Probe:
    """Let the model with its adapter, as it is now, answer the probes."""
    greedy = Sampling(0.0, 1.0, max_own_tokens, max_calls, 0)
    with merged(adapted):
        engine.refresh()
        parts = solve(engine, engine.tokenizer, problems, greedy, AT_ONCE)
        return Probe.of(step, [one for part in parts for one in part])


def why_not(
    before: Probe, after: Probe, forgetting: Forgetting, allowed: float, text: str
) -> str | None:
    """Why what was learnt must not be kept; None when it may.

    When fewer probes are right than the 95 % interval of before allows for, or the perplexity of
    general text has risen by more than `allowed`.
    """
    if after.share.value < before.share.interval[0]:
        return f"of the probes {after.share} are right, {before.share} were"
    if not forgetting.ratio <= 1 + allowed:  # NaN is not
        return f"perplexity of {text} is {forgetting} times the student's"
    return None
