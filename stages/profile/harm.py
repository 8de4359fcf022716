"""Ablation harm and block influence: how far the output moves, and how far a block turns its input.

Ablation harm differs from NIWT's stage 1 (which counts lost keywords in ten prompts): here it is
the mean KL divergence per token from the whole model's distribution.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from modeling.losses import TeacherView
from modeling.streaming import Forward, NotFinite

CHUNK_TOKENS = 512  # positions whose logits are compared at a time


class Judge:
    """Compares forwards of one batch with the whole model's."""

    def __init__(self, whole: Forward, logits: Callable[[Forward, Tensor], Tensor]) -> None:
        """logits: gives a forward's logits (n, V) at n of its positions (modeling/answers.py)."""
        self.shape = whole.hidden.shape[:2]  # (B, T)
        self.parts = torch.arange(self.shape.numel()).split(CHUNK_TOKENS)
        self.views = [TeacherView.of(logits(whole, part)) for part in self.parts]
        self._logits = logits

    def harm(self, changed: Forward) -> Tensor:
        """KL(whole || changed) in nats a token, mean of each row: (B,). Raises NotFinite."""
        pairs = zip(self.views, self.parts, strict=True)
        kl = torch.cat([view.kl(self._logits(changed, part)) for view, part in pairs])
        if not torch.isfinite(kl).all():
            raise NotFinite("the logits are not finite: the head or the norm before it is damaged")
        return kl.view(self.shape).mean(-1)


def influence(before: Tensor, after: Tensor) -> Tensor:
    """1 - cosine of a block's input and output (B, T, D), mean of each row: (B,)."""
    return 1 - torch.cosine_similarity(before.float(), after.float(), dim=-1).mean(-1)
