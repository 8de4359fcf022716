"""Drift: how far a model's blocks have moved from another model's, in directions that matter.

    drift of a block = E |W^T (h - r)|^2 / 2 S

h and r: what the block puts out in the model and in the reference, for the same tokens; W: the
whitening of the teacher block's principal subspace, S wide (stages/formats/importance.py). 0: the
same; 1: as far apart as the states of two tokens drawn at random, nothing of the block is left.
The guard of later training: what anchors hold during distillation is measured behind it.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modeling.blocks import block_outputs
from stages.formats.importance import Subspaces


@dataclass(frozen=True)
class Site:
    """Where two models are compared: outputs of one block in each, in a teacher block's subspace.

    Against the teacher `reference` is the teacher's block itself; of a student before and after
    later training, `reference` and `model` are the same place.
    """

    teacher: int
    reference: int
    model: int


def counterparts(blocks: Iterable[int], dropped: Collection[int]) -> dict[int, int]:
    """Find where a student less `dropped` blocks has the outputs of teacher blocks.

    A kept block is in its new place; the end of a gap is the output of the bridge before it. A
    bridge's own former output and what lay inside a gap have no counterpart and are left out.
    """
    return {
        block: block - sum(other <= block for other in dropped)
        for block in blocks
        if block + 1 not in dropped
    }


@torch.no_grad()
def subspace_drift(
    reference: PreTrainedModel,
    model: PreTrainedModel,
    sites: list[Site],
    subspaces: Subspaces,
    tokens: Tensor,
    batch_rows: int,
) -> list[float]:
    """The drift at each site on rows of tokens (N, T), never trained on."""
    sums = torch.zeros(len(sites), dtype=torch.float64)
    for batch in tokens.split(batch_rows):
        before, after = list(block_outputs(reference, batch)), list(block_outputs(model, batch))
        for place, site in enumerate(sites):
            whitened = (
                subspaces.whiten(site.teacher, states)
                for states in (before[site.reference], after[site.model])
            )
            apart = next(whitened) - next(whitened)
            sums[place] += apart.square().mean(-1).sum().item() / 2
    return (sums / tokens.numel()).tolist()
