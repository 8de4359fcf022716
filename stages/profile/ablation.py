"""Ablation harm: how far the output moves when one block is skipped.

Differs from NIWT's stage 1 (which counts lost keywords in ten prompts): here it is the mean KL
divergence per token from the whole model's distribution. A block is skipped by feeding its input to
the block behind it; the blocks before it are not computed again.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modeling.blocks import Anatomy, BlockCalls, capture_calls, dissect, run_block
from modeling.losses import TeacherView

CHUNK_TOKENS = 128  # positions whose logits are computed at a time


class Trace:
    """A batch's whole way through a model: the state at every block boundary and the output.

    states[l] is the input of block l, (B, T, D); states[L] the output of the last block.
    """

    def __init__(self, model: PreTrainedModel, input_ids: Tensor) -> None:
        self.anatomy: Anatomy = dissect(model)
        self.calls: BlockCalls = capture_calls(model, input_ids)
        self.states = [self.calls.hidden]
        for index in range(len(self.anatomy.blocks)):
            self.states.append(self._run(index, self.states[-1]))
        self.parts = torch.arange(input_ids.numel()).split(CHUNK_TOKENS)
        self.views = [TeacherView.of(self._logits(self.states[-1], part)) for part in self.parts]

    def harm_of_skipping(self, block: int) -> Tensor:
        """KL in nats a token when one block is skipped, mean of each row: (B,)."""
        return self.harm_of(block + 1, self.states[block])

    def harm_of(self, start: int, hidden: Tensor) -> Tensor:
        """KL(whole model || model in which block `start` gets `hidden`), mean of each row: (B,)."""
        for index in range(start, len(self.anatomy.blocks)):
            hidden = self._run(index, hidden)
        pairs = zip(self.views, self.parts, strict=True)
        kl = torch.cat([view.kl(self._logits(hidden, part)) for view, part in pairs])
        return kl.view(hidden.shape[:2]).mean(-1)

    def influence(self, block: int) -> Tensor:
        """1 - cosine of the block's input and output, mean of each row: (B,)."""
        before, after = self.states[block].float(), self.states[block + 1].float()
        return 1 - torch.cosine_similarity(before, after, dim=-1).mean(-1)

    def _logits(self, hidden: Tensor, part: Tensor) -> Tensor:
        """Final norm and head at some of the B T positions: (B, T, D) -> (n, V)."""
        return self.anatomy.head(self.anatomy.normed(hidden.flatten(0, 1)[part]))

    def _run(self, index: int, hidden: Tensor) -> Tensor:
        return run_block(self.anatomy.blocks[index], self.calls, index, hidden)
