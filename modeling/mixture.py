"""One set of targets from several teachers' on the same tokens: the weighted mixture.

The sum of weighted KL(teacher_i || student) has, by the student, the gradient of KL(mixture ||
student), so that a student of several teachers costs one output head a step, not one a teacher.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from modeling.losses import SampledTargets, SparseTargets, Targets


def mix_targets(answers: Sequence[Targets], weights: Sequence[float]) -> Targets:
    """The mixture of several teachers' targets at the same positions; weights are normalised.

    Draws: all of them, their shares weighted: exact. A top k: as many tokens as the longest has,
    the likeliest of the mixture, and the rest as tail. A token that one teacher keeps and another
    does not has the latter's share in the tail, which is a little too large for it: at most the
    least probability that the latter keeps, times its weight.
    One teacher's are given as they are. Raises ValueError for a top k beside draws, for weights
    that are not one a teacher, negative or all 0.
    """
    if len(answers) != len(weights) or min(weights) < 0 or sum(weights) == 0:
        raise ValueError(
            f"{len(answers)} teachers' targets are mixed by the weights {list(weights)}; give one "
            "weight a teacher, none negative, not all 0"
        )
    if len({type(one) for one in answers}) > 1:
        raise ValueError("a top k and draws cannot be mixed; extract all teachers with one answers")
    if len(answers) == 1:
        return answers[0]
    shares = [weight / sum(weights) for weight in weights]
    if isinstance(answers[0], SampledTargets):
        return _mix_draws(answers, shares)
    return _mix_tops(answers, shares)


def _mix_draws(answers: Sequence[SampledTargets], shares: Sequence[float]) -> SampledTargets:
    pairs = list(zip(answers, shares, strict=True))
    return SampledTargets(
        ids=torch.cat([one.ids for one in answers], -1),
        shares=torch.cat([one.shares * share for one, share in pairs], -1),
        log_prob=sum(one.log_prob * share for one, share in pairs),
    )


def _mix_tops(answers: Sequence[SparseTargets], shares: Sequence[float]) -> SparseTargets:
    kept = max(one.ids.shape[-1] for one in answers)
    ids = torch.cat([one.ids for one in answers], -1)  # (..., M)
    masses = [one.log_probs.exp() * s for one, s in zip(answers, shares, strict=True)]
    ids, order = torch.sort(ids, dim=-1, stable=True)
    merged = _sum_of_equals(ids, torch.cat(masses, -1).gather(-1, order))
    top, places = merged.topk(kept, -1)
    return SparseTargets(
        ids=ids.gather(-1, places),
        log_probs=top.clamp_min(torch.finfo(top.dtype).tiny).log(),
        tail=(1 - top.sum(-1)).clamp_min(0),
    )


def _sum_of_equals(ids: Tensor, masses: Tensor) -> Tensor:
    """The mass of each token at its first place, -1 at the others; ids (..., M) are sorted.

    So that a top k of it, k at most as many as there are different tokens, names none twice.
    """
    first = torch.ones_like(ids, dtype=torch.bool)
    first[..., 1:] = ids[..., 1:] != ids[..., :-1]
    group = first.long().cumsum(-1) - 1  # (..., M)
    sums = torch.zeros_like(masses).scatter_add_(-1, group, masses).gather(-1, group)
    return torch.where(first, sums, torch.full_like(sums, -1.0))
