"""Token-level losses over a vocabulary, computed in chunks so that (tokens, V) is never held whole.

The teacher is known by its top-k log-probabilities and the mass of all other tokens, the tail.
Both distributions are coarse-grained to these k + 1 buckets. With bucket log-probabilities b (the
student's) and c (the teacher's) at temperature T, q = softmax(b / T) and t = softmax(c / T),

    L = T^2 KL(t || q)        dL/db = T (q - t)

and through b_j = log p_j, b_tail = log sum_{i not in top-k} p_i the gradient of the logits z is

    dL/dz_i = T (q_i - t_i)               for i in the top-k
    dL/dz_i = T (q_tail - t_tail) p_i / s otherwise, s = the student's tail mass

so forward and backward need one pass over each chunk of logits: between the two products with the
head, they become the gradient where they lie, a few rows at a time. Hinton 2015 gives the T^2.

Or the teacher is known by S tokens drawn from its whole distribution p (modeling/samples.py), and
w_j is the share of the draws that gave token j. E[w] = p, there is no tail, and

    L = sum_j w_j (log p_j - log q_j)     dL/dz_i = q_i - w_i     (q the student's)

are unbiased estimates of KL(p || q) and of its gradient (Anshumann 2025). They are those of
temperature 1: w estimates p, and no softened p could be had of it without the draws' own weights,
which would have to be normalised by an estimate: so another temperature is refused.

Letters: N tokens, D hidden width, V vocabulary, K stored teacher tokens.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

CHUNK_TOKENS = 256  # logits held at a time: 256 x V x 4 bytes, 50 MB at V = 49,152
ROWS = 8  # of logits looked at in one go: 1.6 MB at V = 49,152, which stays in the cache
TINY = 1e-7  # smallest mass of a tail: float16 keeps its logarithm


class _ByPosition:
    """A record of tensors that share their first dimensions."""

    def each(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The same with a function of each tensor."""
        return type(self)(*map(function, vars(self).values()))

    def __getitem__(self, part: Any) -> Self:
        return self.each(lambda tensor: tensor[part])


@dataclass(frozen=True)
class SparseTargets(_ByPosition):
    """What is known of the teacher's next-token distribution at N positions: its top."""

    ids: Tensor  # (N, K) int64
    log_probs: Tensor  # (N, K) float32
    tail: Tensor  # (N,) float32, the mass outside the top-k


@dataclass(frozen=True)
class SampledTargets(_ByPosition):
    """What is known of the teacher's next-token distribution at N positions: draws from it."""

    ids: Tensor  # (N, K) int64; anything where the share is 0
    shares: Tensor  # (N, K) float32, of the draws; they sum to 1
    log_prob: Tensor  # (N,) float32, the mean of the draws' log-probabilities


@dataclass(frozen=True)
class NoTargets(_ByPosition):
    """Nothing is known of a teacher: the text alone teaches."""


Targets = SparseTargets | SampledTargets | NoTargets


def head_loss(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    targets: Targets,
    kd_weight: float,
    ce_weight: float,
    temperature: float,
) -> tuple[Tensor, float, float]:
    """Mean over N tokens of kd_weight * T^2 KL(teacher || student) + ce_weight * CE.

    hidden (N, D), behind the final norm; head (V, D); labels (N,) int64.
    Gives the loss, which back-propagates to `hidden`, and to `head` where it is to be trained, and
    the values of KL (nats, times T^2) and CE (nats). Raises ValueError for sampled targets at
    another temperature than 1.
    """
    if isinstance(targets, SampledTargets) and temperature != 1:
        raise ValueError(
            f"the temperature is {temperature:g}, but sampled targets tell the teacher's "
            "distribution at temperature 1 only"
        )
    if not torch.is_grad_enabled():
        head = head.detach()  # autograd asks for its gradient even where none will be computed
    return _HeadLoss.apply(hidden, head, labels, targets, kd_weight, ce_weight, temperature)


def text_loss(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over N tokens in nats, without the (N, V) logits: `head_loss` of text."""
    return head_loss(hidden, head, labels, NoTargets(), 0.0, 1.0, 1.0)[0]


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, labels, targets, kd_weight, ce_weight, temperature):
        count = hidden.shape[0]
        gradient = torch.empty_like(hidden)
        learns = ctx.needs_input_grad[1]  # else its gradient, as large as itself, is not computed
        head_gradient = torch.zeros_like(head, dtype=torch.float32) if learns else None
        sums = hidden.new_zeros(2, dtype=torch.float64)  # KL and CE; read once, at the end
        held = hidden.new_empty(min(count, CHUNK_TOKENS), head.shape[0])  # one chunk's logits
        of_rows = _OF_ROWS[type(targets)]
        step = ROWS if hidden.device.type == "cpu" else CHUNK_TOKENS
        for start in range(0, count, CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            logits = torch.mm(hidden[part], head.T, out=held[: count - start])
            for row in range(start, start + len(logits), step):
                rows = slice(row, min(row + step, start + len(logits)))
                place = logits[rows.start - start : rows.stop - start]
                kl, ce, by_logits = of_rows(
                    place.float(), labels[rows], targets[rows], kd_weight, ce_weight, temperature
                )
                sums += torch.stack([kl, ce])
                place.copy_(by_logits)
            torch.mm(logits, head, out=gradient[part])
            if learns:
                head_gradient.addmm_(logits.T.float(), hidden[part].float(), alpha=1 / count)
        ctx.save_for_backward(gradient.div_(count), head_gradient)
        kl, ce = (sums / count).tolist()
        return hidden.new_tensor(kd_weight * kl + ce_weight * ce, dtype=torch.float32), kl, ce

    @staticmethod
    def backward(ctx, upstream, _kl, _ce):
        gradient, head_gradient = ctx.saved_tensors
        if head_gradient is not None:
            head_gradient = (head_gradient * upstream).to(gradient.dtype)
        return gradient * upstream.to(gradient.dtype), head_gradient, None, None, None, None, None


def _of_rows(
    logits: Tensor,  # (n, V) float32; overwritten
    labels: Tensor,
    targets: SparseTargets,
    kd_weight: float,
    ce_weight: float,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of KL and CE over n tokens, and the gradient of their weighted sum by the logits."""
    label = logits.gather(-1, labels[:, None])  # (n, 1)
    top = logits.gather(-1, targets.ids)  # (n, K)
    e, largest = _exponentials(logits)
    e.scatter_(-1, targets.ids, 0.0)
    rest = e.sum(-1, keepdim=True)
    total = rest + (top - largest).exp_().sum(-1, keepdim=True)  # (n, 1)
    log_z = total.log() + largest
    top -= log_z  # the student's log-probabilities
    tail = (rest / total).clamp_min_(TINY)  # (n, 1)
    q_log = torch.cat([top, tail.log()], -1).div_(temperature).log_softmax(-1)
    t_log = torch.cat([targets.log_probs, targets.tail[:, None].clamp_min(TINY).log()], -1)
    t_log = t_log.div_(temperature).log_softmax(-1)
    kl = (t_log.exp() * (t_log - q_log)).sum().double() * temperature**2
    bucket = (q_log.exp() - t_log.exp()).mul_(kd_weight * temperature)  # (n, K + 1)
    e.mul_((bucket[:, -1:] / tail + ce_weight) / total)
    e.scatter_(-1, targets.ids, bucket[:, :-1] + ce_weight * top.exp())
    e.scatter_add_(-1, labels[:, None], torch.full_like(log_z, -ce_weight))
    return kl, (log_z - label).sum().double(), e


def _of_sampled_rows(
    logits: Tensor,  # (n, V) float32; overwritten
    labels: Tensor,
    targets: SampledTargets,
    kd_weight: float,
    ce_weight: float,
    _temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_of_rows`, of draws."""
    label = logits.gather(-1, labels[:, None])  # (n, 1)
    drawn = logits.gather(-1, targets.ids)  # (n, K)
    e, largest = _exponentials(logits)
    total = e.sum(-1, keepdim=True)  # (n, 1)
    log_z = total.log() + largest
    log_q = drawn - log_z
    kl = (targets.log_prob - (targets.shares * log_q).sum(-1)).sum().double()
    e.mul_((kd_weight + ce_weight) / total)
    e.scatter_add_(-1, targets.ids, targets.shares.to(e.dtype) * -kd_weight)
    e.scatter_add_(-1, labels[:, None], torch.full_like(log_z, -ce_weight))
    return kl, (log_z - label).sum().double(), e


def _of_text_rows(
    logits: Tensor,  # (n, V) float32; overwritten
    labels: Tensor,
    _targets: NoTargets,
    _kd_weight: float,
    ce_weight: float,
    _temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_of_rows`, of the text alone: KL is 0."""
    label = logits.gather(-1, labels[:, None])  # (n, 1)
    e, largest = _exponentials(logits)
    total = e.sum(-1, keepdim=True)  # (n, 1)
    log_z = total.log() + largest
    e.mul_(ce_weight / total)
    e.scatter_add_(-1, labels[:, None], torch.full_like(log_z, -ce_weight))
    ce = (log_z - label).sum().double()
    return torch.zeros_like(ce), ce, e


_OF_ROWS = {SparseTargets: _of_rows, SampledTargets: _of_sampled_rows, NoTargets: _of_text_rows}


def _exponentials(logits: Tensor) -> tuple[Tensor, Tensor]:
    """exp(z - max z) of (n, V), in place, and the maxima (n, 1): one exponential an element."""
    largest = logits.amax(-1, keepdim=True)
    return logits.sub_(largest).exp_(), largest


@dataclass(frozen=True)
class TeacherView:
    """A teacher's full distribution at N positions, made once and compared with many students.

    Logits are looked at a few rows at a time, so that what is made of them stays in the cache.
    """

    probs: Tensor  # (N, V) float32
    negative_entropy: Tensor  # (N,) nats
    choice: Tensor  # (N,) the most likely token

    @classmethod
    def of(cls, logits: Tensor) -> "TeacherView":
        """From logits (N, V)."""
        parts = []
        for part in logits.split(ROWS):
            log_probs = part.float().log_softmax(-1)
            probs = log_probs.exp()
            parts.append((probs, (probs * log_probs).sum(-1), part.argmax(-1)))
        return cls(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def kl(self, logits: Tensor) -> Tensor:
        """KL(teacher || student) in nats over the full vocabulary: logits (N, V) -> (N,)."""
        return torch.cat([kl for kl, _ in self._rows(logits)])

    def scores(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """KL, the student's cross-entropy (nats), and top-1 agreement (0 or 1); (N,) each."""
        kl, log_z = (torch.cat(column) for column in zip(*self._rows(logits), strict=True))
        ce = log_z - logits.gather(-1, labels[:, None])[:, 0].float()
        return kl, ce, (logits.argmax(-1) == self.choice).float()

    def _rows(self, logits: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """KL and the log of the normaliser, some rows at a time."""
        pieces = (self.probs.split(ROWS), self.negative_entropy.split(ROWS), logits.split(ROWS))
        for probs, negative_entropy, part in zip(*pieces, strict=True):
            z = part.float()
            log_z = z.logsumexp(-1)
            yield negative_entropy - (probs * z).sum(-1) + log_z, log_z
