"""Distillation with activation anchoring: the student's loss on one batch of stored targets.

    L = kd_weight * T^2 KL(teacher_T || student_T) + ce_weight * CE
        + anchor_weight * sum_l w_l |W_l^T (P_l h_s - mean_l) - c_l|^2 / S

over next-token positions; KL over the teacher's top-k and the tail, or estimated from draws
(modeling/losses.py). c_l are
the stored whitened coordinates of the teacher's anchor block l, W_l its whitening, so the last term
is an error relative to the subspace's own variance; w_l are the blocks' ablation harms, normalised;
P_l is a learned map from the student's width to the teacher's, started at the identity where they
are the same, and thrown away afterwards.

The prefix, the blocks that student and teacher share, is read from the targets: it is neither
computed nor trained. Where a batch has none, as of a teacher that the student was not cut from, the
student embeds the tokens and runs its own prefix; and where student and teacher share no block, the
student does so always. A student of another width trains its embedding and its head as well.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from modeling.blocks import BlockCalls, capture_calls, dissect, run_block
from modeling.losses import head_loss
from stages.distill.feeding import send
from stages.formats.importance import Subspaces
from stages.formats.targets import Batch
from stages.measuring.drift import counterparts


@dataclass(frozen=True)
class Weights:
    """How much each term counts."""

    kd: float
    ce: float
    anchor: float
    temperature: float


@dataclass(frozen=True)
class Anchor:
    """A teacher block whose output the student stays close to, and where the student has it."""

    block: int  # of the teacher
    student_block: int  # whose output is compared
    weight: float  # normalised over all anchors


@dataclass(frozen=True)
class Loss:
    """One batch's loss, and its parts as numbers."""

    total: Tensor
    kl: float
    ce: float
    anchor: float


class AnchorMaps(nn.Module):
    """The learned maps P_l, one a teacher anchor block; kept in float32."""

    def __init__(self, anchors: list[Anchor], start: int | Tensor) -> None:
        """start: where each map starts, (D_teacher, D_student); or the width of the identity."""
        super().__init__()
        first = torch.eye(start) if isinstance(start, int) else start.float()
        self.maps = nn.ParameterDict({str(a.block): nn.Parameter(first.clone()) for a in anchors})

    def forward(self, block: int, hidden: Tensor) -> Tensor:
        """P_l h for hidden (..., D_student): (..., D_teacher)."""
        return hidden.float() @ self.maps[str(block)].T


def place_anchors(blocks: tuple[int, ...], dropped: list[int], harms: list[float]) -> list[Anchor]:
    """Find where the student has the output of each teacher anchor block, and how much it counts.

    Anchors without a counterpart are left out.
    """
    placed = counterparts(blocks, dropped)
    total = sum(harms[block] for block in placed)
    return [Anchor(block, place, harms[block] / total) for block, place in placed.items()]


def pair_by_depth(blocks: tuple[int, ...], count: int, harms: list[float]) -> list[Anchor]:
    """Find the block of a network of `count` blocks that is as deep, relatively, as each anchor.

    harms: of all blocks of the teacher. Of several anchors for one block the most harmful stays: no
    state is pulled to two places.
    """
    chosen: dict[int, int] = {}
    for block in sorted(blocks, key=lambda block: harms[block]):
        chosen[max(0, round((block + 1) / len(harms) * count) - 1)] = block
    total = sum(harms[block] for block in chosen.values())
    pairs = sorted((block, position) for position, block in chosen.items())
    return [Anchor(block, position, harms[block] / total) for block, position in pairs]


def trainable(
    student: PreTrainedModel, prefix: int, maps: AnchorMaps, vocabulary: bool = False
) -> list[tuple[str, nn.Parameter]]:
    """Everything behind the prefix; with `vocabulary` the embedding and the head as well.

    In tied models these are one, under the embedding's name.
    """
    anatomy = dissect(student)
    named = [
        (f"blocks.{index}.{name}", parameter)
        for index, block in enumerate(anatomy.blocks)
        if index >= prefix
        for name, parameter in block.named_parameters()
    ]
    named += [(f"norm.{name}", parameter) for name, parameter in anatomy.norm.named_parameters()]
    if vocabulary:
        embedding = student.get_input_embeddings().weight
        named.append(("embedding.weight", embedding))
        if anatomy.head.weight is not embedding:
            named.append(("head.weight", anatomy.head.weight))
    return named + list(maps.named_parameters())


class Objective:
    """The loss as a function of a batch; holds what stays the same from step to step."""

    def __init__(
        self,
        student: PreTrainedModel,
        prefix: int,
        anchors: list[Anchor],
        maps: AnchorMaps,
        subspaces: Subspaces,
        weights: Weights,
        recompute: bool = False,
    ) -> None:
        """recompute: keep only each block's input for the backward pass (gradient checkpointing,
        Chen 2016); the same gradients, for a forward pass more."""
        self.student, self.prefix, self.weights = student, prefix, weights
        self.anatomy = dissect(student)
        self.device = self.anatomy.head.weight.device
        self.anchors, self.maps = anchors, maps.to(self.device)
        self.subspaces = subspaces.to(self.device)
        self._run = self._recomputed if recompute else run_block
        self._calls: BlockCalls | None = None

    def __call__(self, batch: Batch) -> Loss:
        """Compute the loss of one batch; back-propagate from its `total`."""
        batch = send(batch, self.device)
        hidden, states = self._forward(batch)
        labels, targets = batch.next_token()
        w = self.weights
        head, kl, ce = head_loss(
            self.anatomy.normed(hidden)[:, :-1].flatten(0, 1),
            self.anatomy.head.weight, labels, targets, w.kd, w.ce, w.temperature,
        )  # fmt: skip
        anchor = self._anchor_loss(batch, states)
        return Loss(head + w.anchor * anchor, kl, ce, anchor.item())

    def _forward(self, batch: Batch) -> tuple[Tensor, dict[int, Tensor]]:
        """Run the blocks behind the prefix: the last state, and the output of every block."""
        prefix = batch.prefix if self.prefix else None
        known = self._calls is not None and self._calls.hidden.shape[:2] == batch.tokens.shape
        if prefix is None or not known:
            learns = self.student.get_input_embeddings().weight.requires_grad
            self._calls = capture_calls(self.student, batch.tokens, embedding_learns=learns)
        hidden = self._calls.hidden if prefix is None else prefix
        hidden, states = hidden.to(self.student.dtype), {}
        if prefix is None:
            with torch.no_grad():
                for index in range(self.prefix):
                    hidden = run_block(self.anatomy.blocks[index], self._calls, index, hidden)
        for index in range(self.prefix, len(self.anatomy.blocks)):
            hidden = self._run(self.anatomy.blocks[index], self._calls, index, hidden)
            states[index] = hidden
        return hidden, states

    @staticmethod
    def _recomputed(block: nn.Module, calls: BlockCalls, index: int, hidden: Tensor) -> Tensor:
        return checkpoint(
            run_block, block, calls, index, hidden,
            use_reentrant=False, preserve_rng_state=False,  # evaluation mode: nothing is drawn
        )  # fmt: skip

    def _anchor_loss(self, batch: Batch, states: dict[int, Tensor]) -> Tensor:
        total = torch.zeros((), device=self.device)
        if self.weights.anchor == 0 or not batch.anchors:
            return total
        for anchor in self.anchors:
            mapped = self.maps(anchor.block, states[anchor.student_block])
            error = self.subspaces.whiten(anchor.block, mapped) - batch.anchors[anchor.block]
            total = total + anchor.weight * error.square().mean()
        return total
