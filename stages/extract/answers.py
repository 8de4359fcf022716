"""One batch through a teacher: its answers, its state behind the prefix, its anchors."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modeling.blocks import capture_calls, dissect, run_block
from modeling.losses import CHUNK_TOKENS, sparse_targets
from stages.formats.importance import Subspaces


@torch.no_grad()
def read_answers(
    model: PreTrainedModel,
    tokens: Tensor,
    top_k: int,
    prefix: int,
    anchors: tuple[int, ...],
    subspaces: Subspaces,
) -> dict[str, Tensor]:
    """Give the tensors of stages/formats/targets.py for rows of tokens, (B, T) int64."""
    anatomy = dissect(model)
    calls = capture_calls(model, tokens)
    hidden, kept = calls.hidden, {"tokens": tokens.int()}
    for index, block in enumerate(anatomy.blocks):
        if index == prefix:
            kept["prefix"] = hidden.bfloat16()
        hidden = run_block(block, calls, index, hidden)
        if index in anchors:
            kept[f"anchor.{index}"] = subspaces.whiten(index, hidden).bfloat16()
    normed = anatomy.normed(hidden).flatten(0, 1)  # (B T, D)
    parts = [sparse_targets(anatomy.head(part), top_k) for part in normed.split(CHUNK_TOKENS)]
    shape = tokens.shape
    kept["ids"] = torch.cat([part.ids for part in parts]).int().view(*shape, top_k)
    kept["log_probs"] = torch.cat([part.log_probs for part in parts]).half().view(*shape, top_k)
    kept["tail"] = torch.cat([part.tail for part in parts]).log().half().view(shape)
    return kept
