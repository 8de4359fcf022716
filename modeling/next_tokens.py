"""A model's answers together with its log-probability of the token that really follows.

The top k need not hold the token that follows, and a span of several tokens is as likely as all of
them together (modeling/alignment.py): so its log-probability is read in the same pass over the
pieces of the vocabulary as the top k are, and costs 2 bytes a position in float16.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from modeling.answers import Answers, fold_head, head_not_finite
from modeling.streaming import Passage


@dataclass
class Followed:
    """Answers at N positions, and the logits (N,) of the tokens that follow, -inf until met."""

    answers: Answers
    logit: Tensor

    def log_prob(self) -> Tensor:
        """Of the tokens that follow, (N,) float32."""
        top = self.answers.top - self.answers.top[:, :1]
        log_z = torch.logaddexp(top.logsumexp(-1), self.answers.rest)
        return self.logit - self.answers.top[:, 0] - log_z


def read_followed(passage: Passage, k: int, tokens: list[Tensor]) -> Iterator[Followed]:
    """Give each batch's answers, when a passage has run up to the head; positions flattened.

    tokens: the batches' own, (B, T) each; behind a row's last position its first token is taken to
    follow, which says nothing. Raises NotFinite.
    """
    following = torch.cat([batch.roll(-1, -1).flatten() for batch in tokens])

    def step(before: Followed | None, logits: Tensor, first_id: int, place: int) -> Followed:
        here = Answers.of(logits, k, first_id)
        wanted = following[place : place + len(logits)].to(logits.device) - first_id
        inside = (wanted >= 0) & (wanted < logits.shape[-1])
        met = logits.gather(-1, wanted.where(inside, 0)[:, None])[:, 0].float()
        if before is None:
            return Followed(here, met.where(inside, met.new_tensor(-torch.inf)))
        return Followed(before.answers.join(here, k), met.where(inside, before.logit))

    for parts in fold_head(passage, step):
        answers = Answers.together([part.answers for part in parts])
        if not torch.isfinite(answers.top[:, 0]).all():
            raise head_not_finite(passage)
        yield Followed(answers, torch.cat([part.logit for part in parts]))
