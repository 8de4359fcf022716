"""Let the policy answer, reward what it wrote, and say how much better each answer was than its
group: GRPO's steps 1 to 3."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedTokenizerBase

from runtime.generation.answers import Answer, Sampling
from runtime.generation.engine import Engine
from runtime.prompt import prompt_tokens
from stages.formats.conversations import Conversation
from stages.grpo.objective import advantages
from stages.grpo.policy import Trace
from stages.grpo.rewards import Reward, weighted_sum
from stages.learning.supervision import Example

SEEDS_A_STEP = 2**20  # a step's draws are told from another's by the seed of its sampling


@dataclass(frozen=True)
class Coach:
    """What turns problems into traces."""

    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling
    candidates: int
    rewards: Mapping[str, Reward]
    weights: Mapping[str, float]
    loss: str

    def roll_out(
        self, engine: Engine, problems: Sequence[Conversation], step: int
    ) -> tuple[list[Trace], dict[str, float]]:
        """Traces of the groups that teach something, and what was seen of all.

        A group whose answers were all rewarded alike has no advantage: it is left out.
        """
        prompts = [prompt_tokens(problem.prompt, self.tokenizer) for problem in problems]
        sampling = replace(self.sampling, seed=self.sampling.seed * SEEDS_A_STEP + step)
        groups = engine.answer(prompts, self.candidates, sampling)
        answers = [answer for group in groups for answer in group]
        totals, parts = self._reward(answers, problems)
        by_group = torch.tensor(totals).view(len(problems), self.candidates)
        better = advantages(by_group, self.loss)
        traces = [
            Trace(example_of(prompt, answer), advantage)
            for prompt, group, row in zip(prompts, groups, better.tolist(), strict=True)
            for answer, advantage in zip(group, row, strict=True)
            if any(row)
        ]
        return traces, {
            "reward": by_group.mean().item(),
            "own_tokens": sum(sum(answer.own) for answer in answers) / len(answers),
            "groups_used": len(traces) / len(answers),
            "cut_off": sum(answer.finished != "eos" for answer in answers) / len(answers),
            **{f"reward_{name}": sum(part) / len(part) for name, part in parts.items()},
        }

    def _reward(
        self, answers: list[Answer], problems: Sequence[Conversation]
    ) -> tuple[list[float], dict[str, list[float]]]:
        """Answers that did not end by themselves, and those with a result that the model forged,
        count as empty, whatever they say (as in stages/measuring/solving.py): nothing rewards
        them."""
        every = [problem for problem in problems for _ in range(self.candidates)]
        texts = [
            answer.text if answer.finished == "eos" and not answer.forged else ""
            for answer in answers
        ]
        return weighted_sum(
            self.rewards, self.weights, texts,
            answer=[problem.answer for problem in every],
            prompts=[problem.prompt for problem in every],
            sources=[problem.facts.get("sources") for problem in every],
            needed=[problem.facts.get("needed") for problem in every],
        )  # fmt: skip


def example_of(prompt: list[int], answer: Answer) -> Example:
    """A prompt with an answer as it was written: only own tokens are counted."""
    return Example((*prompt, *answer.tokens), (*(False,) * len(prompt), *answer.own))


CountTokens = Callable[[str], int]


def token_counter(tokenizer: PreTrainedTokenizerBase) -> CountTokens:
    """How long a text is in tokens."""
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])
