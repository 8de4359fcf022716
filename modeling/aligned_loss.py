"""The loss of a student whose teacher has another tokenizer: KL over buckets, spans and the tail.

With the student's masses b of the parts of modeling/alignment.py and the teacher's c, at
temperature T, q = softmax(log b / T) and t = softmax(log c / T), as in modeling/losses.py:

    L = kd_weight * mean over N common boundaries of T^2 KL(t || q) + ce_weight * mean over M of CE

A bucket's b is the sum of its tokens' probabilities, a span's the product of its tokens', the
tail's what is left. Spans join positions, so the gradient by the masses is autograd's; logits are
computed a chunk at a time and again on the way back, so (M, V) is never held whole.

Letters as there, with D the hidden width and V the student's vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

import modeling.losses
from modeling.losses import TINY

NOTHING = -1e4  # the logarithm of a part that is not there: finite, so that 0 times it is 0
LEAST = 1e-30  # mass of a bucket


@dataclass(frozen=True)
class AlignedTargets:
    """The teacher's parts at N of a batch's M positions that have a next token.

    positions: (N,) int64, rising.  ids, groups: (N, C).  log_masses: (N, B + 2): buckets, the span,
    the tail; NOTHING for a part that is not there.  span_of: (M,), which span a position's next
    token lies in; N for none.
    """

    positions: Tensor
    ids: Tensor
    groups: Tensor
    log_masses: Tensor
    span_of: Tensor


def aligned_loss(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    targets: AlignedTargets,
    kd_weight: float,
    ce_weight: float,
    temperature: float,
) -> tuple[Tensor, float, float]:
    """The loss above, and the values of KL (nats, times T^2) and CE (nats).

    hidden (M, D), behind the final norm; head (V, D); labels (M,) int64. Back-propagates to hidden
    and head. Raises ValueError without a common boundary.
    """
    if not len(targets.positions):
        raise ValueError("teacher and student have no common boundary in this batch")
    log_probs, masses = [], []
    for start in range(0, len(hidden), modeling.losses.CHUNK_TOKENS):
        part = slice(start, start + modeling.losses.CHUNK_TOKENS)
        here = (targets.positions >= part.start) & (targets.positions < part.stop)
        label, mass = checkpoint(
            _look, hidden[part], head, labels[part], targets.positions[here] - start,
            targets.ids[here], targets.groups[here], targets.log_masses.shape[1] - 1,
            use_reentrant=False,
        )  # fmt: skip
        log_probs.append(label)
        masses.append(mass)
    label_log_probs, mass = torch.cat(log_probs), torch.cat(masses)
    kl = _divergence(label_log_probs, mass, targets, temperature)
    ce = -label_log_probs.mean()
    return kd_weight * kl + ce_weight * ce, kl.item(), ce.item()


def _look(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    at: Tensor,
    ids: Tensor,
    groups: Tensor,
    parts: int,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of labels (m,), and the masses (n, parts) of buckets and, last, the tail.

    The tail holds the span, which other positions are needed for.
    """
    logits = hidden @ head.T
    log_p = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
    p = log_p[at].exp()  # (n, V)
    there = ids >= 0
    listed = p.gather(-1, ids.clamp_min(0)) * there
    mass = p.new_zeros(len(p), parts).scatter_add(-1, groups, listed)
    others = pad(p, (0, 1)).scatter(-1, ids.where(there, ids.new_tensor(p.shape[-1])), 0.0)
    tail = torch.zeros_like(mass).index_fill(-1, mass.new_tensor([parts - 1]).long(), 1.0)
    return log_p.gather(-1, labels[:, None])[:, 0], mass + tail * others.sum(-1, keepdim=True)


def _divergence(
    labels: Tensor, mass: Tensor, targets: AlignedTargets, temperature: float
) -> Tensor:
    """T^2 KL(teacher || student) over the parts, mean over N; labels (M,), mass (N, B + 1)."""
    count = len(mass)
    wanted = targets.log_masses.to(mass.dtype)  # (N, B + 2)
    sums = labels.new_zeros(count + 1).index_add(0, targets.span_of, labels)[:count]
    own = wanted[:, -2] > NOTHING
    span = sums.where(own, sums.new_tensor(NOTHING))
    tail = (mass[:, -1] - span.exp()).clamp_min(TINY)
    log_mass = torch.cat(
        [mass[:, :-1].clamp_min(LEAST).log(), span[:, None], tail.log()[:, None]], -1
    )
    log_mass = log_mass.where(wanted > NOTHING, log_mass.new_tensor(NOTHING))
    q_log = (log_mass / temperature).log_softmax(-1)
    t_log = (wanted / temperature).log_softmax(-1)
    return (t_log.exp() * (t_log - q_log)).sum(-1).mean() * temperature**2
