"""A frozen model as a judge: how likely it finds an answer, a token on average.

Nano-Cog ranks by such a judge. Here it may only break ties (rewards.py): a model that cannot solve
a problem has no say in what is right.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling.token_log_probs import token_log_probs
from runtime.prompt import prompt_tokens


class FrozenJudge:
    """Mean log-probability, in nats a token, that a model gives to replies."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self._model, self._tokenizer = model, tokenizer

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], replies: Sequence[str]) -> list[float]:
        """A score for each reply; that of an empty one is 0 tokens' worth of nothing, so 0."""
        return [self._score(p, r) if r else 0.0 for p, r in zip(prompts, replies, strict=True)]

    def _score(self, prompt: str, reply: str) -> float:
        asked = prompt_tokens(prompt, self._tokenizer)
        said = self._tokenizer(reply, add_special_tokens=False)["input_ids"]
        tokens = torch.tensor([asked + said], device=self._model.device)
        hidden = self._model.base_model(tokens, use_cache=False).last_hidden_state
        head = self._model.get_output_embeddings().weight
        states = hidden[0, len(asked) - 1 : -1].to(head.dtype)
        return token_log_probs(states, head, tokens[0, len(asked) :])[0].mean().item()
