"""Group relative policy optimisation (GRPO, Shao 2024, section 4.1), as pure functions.

A group is the answers to one prompt. With rewards r, an answer's advantage is

    A = (r - mean r) / (std r + 1e-4)          over its group; dr_grpo (Liu 2025): r - mean r

and, with rho = p / p_old of a token that the model wrote itself, the loss to minimise is

    w [ - min(rho A, clip(rho, 1 - e, 1 + e) A) + beta rho k3 ]    summed over tokens
    k3 = p_ref / p - log(p_ref / p) - 1        unbiased, never negative (Schulman 2020)

The factor rho of k3 is not in Shao; DeepSeek-V3.2 (2025) and TRL have it. It is 1 in the first
update of a step, but its gradient is not 0. With it the gradient is an unbiased estimate of that of
KL(p || p_ref), which is what k3 estimates; without it, of that of KL(p_ref || p).

The weights w say how answers of different lengths count:

    grpo      1 / (answers x tokens of the answer)      each answer alike
    dr_grpo   1 / (answers x most tokens)               each token alike, whatever the batch
    dapo      1 / tokens of the batch                   each token alike (Yu 2025)
"""

import torch
from torch import Tensor

LOSSES = ("grpo", "dr_grpo", "dapo")
TINY = 1e-4  # TRL's; a group of equal rewards has no advantage rather than a division by zero


def advantages(rewards: Tensor, loss: str) -> Tensor:
    """Advantages of rewards (groups, candidates): the same shape; each group sums to 0.

    In a group of equal rewards they are exactly 0, which a rounded mean would not make them.
    """
    differ = rewards.amax(-1, keepdim=True) > rewards.amin(-1, keepdim=True)
    centred = torch.where(differ, rewards - rewards.mean(-1, keepdim=True), 0.0)
    if loss == "dr_grpo":
        return centred
    return centred / (rewards.std(-1, keepdim=True) + TINY)


def token_weights(lengths: Tensor, most_tokens: int, loss: str) -> Tensor:
    """What each token of an answer counts, by answer: lengths (N,) of own tokens -> (N,)."""
    count = len(lengths)
    if loss == "grpo":
        return 1 / (count * lengths.clamp_min(1))
    if loss == "dr_grpo":
        return torch.full((count,), 1 / (count * most_tokens))
    return torch.full((count,), 1 / max(1, int(lengths.sum())))


def token_losses(
    new: Tensor, old: Tensor, reference: Tensor, advantage: Tensor, clip: float, beta: float
) -> Tensor:
    """The loss of each own token before its weight, (N,), from log-probabilities (N,).

    new: of the policy that learns; old: of the one that wrote; reference: of the one to stay near.
    """
    ratio = (new - old).exp()
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    return beta * ratio * k3(new, reference) - gain


def k3(new: Tensor, reference: Tensor) -> Tensor:
    """The estimate of KL(policy || reference) at tokens drawn from the policy, nats (N,)."""
    apart = reference - new
    return apart.exp() - apart - 1
