"""Fit a linear layer to what its outputs ought to be, in closed form; and choose its inputs.

A layer y = W a is changed to W + dW, with

    dW = argmin  sum_n  w_n | r_n - dW a_n |^2  +  ridge * sum_j A_jj |dW_j|^2

a_n its inputs, r_n what is wanted of it less what it gives, w_n the weight of a token, and
A = sum_n w_n a_n a_n^T. All that is needed of the tokens are sums, so any number of them will do.

Which inputs to take away, in groups (a neuron is a group of one, an attention head of its columns),
is a rule: a function of these sums. `eliminate` asks what the best fit without a group would lose,
takes the least one, and asks again (optimal brain surgeon, Hassibi 1993; structured as in ZipLM,
Kurtic 2023): of two inputs that do the same it takes one, which no score of each alone can.

Places are kept on the CPU, sums where the layer is.

Letters: N tokens, F inputs, D outputs, G groups of g inputs each.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

LUMPS = 64  # groups go in so many portions, each found from the best fit without those before it


@dataclass(frozen=True)
class Moments:
    """Sums over tokens, of a layer's inputs and of what is missing of its outputs."""

    gram: Tensor  # (F, F) sum of w a a^T
    cross: Tensor  # (F, D) sum of w a r^T
    total: float  # sum of w |r|^2

    @classmethod
    def none(cls, layer: nn.Linear) -> "Moments":
        """Of a layer and no tokens, where the layer is."""
        inputs, outputs = layer.in_features, layer.out_features
        gram, cross = (
            layer.weight.new_zeros(inputs, inputs),
            layer.weight.new_zeros(inputs, outputs),
        )
        return cls(gram.float(), cross.float(), 0.0)

    def plus(self, a: Tensor, r: Tensor, w: Tensor) -> "Moments":
        """With some tokens more: a (N, F), r (N, D), w (N, 1)."""
        weighted = (a * w).T
        total = self.total + (r.square() * w).sum().item()
        return Moments(self.gram.addmm(weighted, a), self.cross.addmm(weighted, r), total)

    def without(self, columns: Tensor, kept: Tensor) -> "Moments":
        """When only the inputs `kept` (F',) stay, and a layer of `columns` (D, F) loses the rest.

        What the others gave is then missing as well: r becomes r + W_gone a_gone.
        """
        gone = torch.ones(len(self.gram), dtype=torch.bool)
        gone[kept] = False
        lost = columns[:, gone].T.float()  # (F - F', D)
        cross = self.cross + self.gram[:, gone] @ lost
        total = self.total + ((self.cross[gone] + cross[gone]) * lost).sum().item()
        return Moments(self.gram[kept][:, kept], cross[kept], total)

    def damped(self, ridge: float) -> Tensor:
        """The matrix of the normal equations, (F, F)."""
        diagonal = self.gram.diagonal()
        diagonal = diagonal.clamp_min(1e-6 * diagonal.mean())  # an input that is always 0
        return self.gram + ridge * torch.diag(diagonal)

    def solve(self, ridge: float) -> tuple[Tensor, float]:
        """The best dW (D, F), and the share of the missing that it makes up for (R^2)."""
        update = torch.linalg.solve(self.damped(ridge), self.cross)  # (F, D)
        left = self.total - 2 * (update * self.cross).sum().item()
        left += (update * (self.gram @ update)).sum().item()
        return update.T, 1 - left / self.total if self.total else 1.0


Rule = Callable[[Moments, Tensor, float, Tensor, int], Tensor]


def eliminate(moments: Moments, weight: Tensor, ridge: float, groups: Tensor, keep: int) -> Tensor:
    """Take groups of inputs away, those first without which the best fit loses least.

    weight (D, F).  groups (G, g): candidates, as columns; other inputs stay.  Gives the places of
    the groups that stay, ascending, (keep,).
    """
    inverse = torch.linalg.inv(moments.damped(ridge).double())
    fit = weight.double() + moments.solve(ridge)[0].double()
    alive, lump = torch.arange(len(groups)), max(1, len(groups) // LUMPS)
    while len(alive) > keep:
        places = groups[alive]  # (G', g)
        lost = fit[:, places].permute(1, 0, 2)  # (G', D, g)
        blocks = inverse[places[:, :, None], places[:, None, :]]  # (G', g, g)
        losses = (torch.linalg.solve(blocks, lost.mT) * lost.mT).sum((1, 2)).cpu()
        order = losses.argsort(stable=True)
        count = min(lump, len(alive) - keep)
        gone = places[order[:count]].flatten()
        share = torch.linalg.solve(inverse[gone][:, gone], inverse[gone])  # (count g, F)
        fit = fit - fit[:, gone] @ share
        inverse = inverse - inverse[:, gone] @ share
        alive = alive[order[count:].sort().values]
    return alive


def largest_effect(
    moments: Moments, weight: Tensor, _ridge: float, groups: Tensor, keep: int
) -> Tensor:
    """Keep the groups of the largest mean |W_g a_g|^2: what each alone gives (Wanda, Sun 2023)."""
    lost, grams = weight.float()[:, groups], moments.gram[groups[:, :, None], groups[:, None, :]]
    scores = torch.einsum("dgi,gij,dgj->g", lost, grams, lost).cpu()
    return scores.argsort(descending=True, stable=True)[:keep].sort().values


def largest_activation(
    moments: Moments, _weight: Tensor, _ridge: float, groups: Tensor, keep: int
) -> Tensor:
    """Keep the groups of the largest mean |a_g|^2, Minitron's rule (with its L2 over the batch)."""
    scores = moments.gram.diagonal()[groups].sum(-1).cpu()
    return scores.argsort(descending=True, stable=True)[:keep].sort().values


RULES: dict[str, Rule] = {
    "elimination": eliminate,
    "effect": largest_effect,
    "activation": largest_activation,
}
