"""Learn from answers that were rewarded: one update of the policy, GRPO's step 4.

A trace is a prompt and an answer with its advantage. Traces of about equal lengths are computed
together, padded behind; logits are made for the policy's own tokens alone, what tools answered is
read but never learnt.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modeling.lora import Adapted, as_reference
from modeling.token_log_probs import token_log_probs
from stages.grpo.objective import k3, token_losses, token_weights
from stages.supervision import Example, alike, make_rows


@dataclass
class Trace:
    """An answer that is learnt from; own tokens are the counted ones of the example.

    old, reference: log-probabilities of own tokens (N,), filled in before the first update.
    """

    example: Example
    advantage: float
    old: Tensor | None = None
    reference: Tensor | None = None
    weight: float = field(default=0.0)

    def __len__(self) -> int:
        return len(self.example)

    @property
    def own(self) -> int:
        """How many tokens the policy wrote itself."""
        return sum(self.example.counted)


@dataclass(frozen=True)
class Policy:
    """A model whose adapter learns, with an adapter to stay near to (modeling/lora.py)."""

    adapted: Adapted
    pad: int
    most_tokens: int
    temperature: float

    @property
    def model(self) -> PreTrainedModel:
        """The model that carries the adapters."""
        return self.adapted.get_base_model()

    def log_probs(self, traces: Sequence[Trace]) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies of the own tokens of traces, one behind the other."""
        rows = make_rows([[trace.example] for trace in traces], self.pad)
        tokens = rows.tokens.to(self.model.device)
        counted = rows.counted[:, 1:].to(self.model.device)
        hidden = self.model.base_model(tokens, use_cache=False).last_hidden_state
        head = self.model.get_output_embeddings().weight
        own = hidden[:, :-1][counted].to(head.dtype)
        return token_log_probs(own, head, tokens[:, 1:][counted], self.temperature)


@torch.no_grad()
def look_back(policy: Policy, traces: list[Trace], beta: float) -> None:
    """Fill in what the traces' tokens had for probabilities in the reference."""
    for group in alike(traces, policy.most_tokens):
        if beta:
            with as_reference(policy.adapted):
                found, _ = policy.log_probs(group)
            for trace, part in zip(group, found.split([t.own for t in group]), strict=True):
                trace.reference = part


def accumulate(
    policy: Policy, traces: list[Trace], loss: str, clip: float, beta: float, most_own: int
) -> dict[str, float]:
    """Add the gradients of the loss over all traces to the adapter's; gives what was seen.

    The first time, the probabilities of the moment are noted as those that the answers were written
    with. beta: weight of the estimated KL to the reference; 0 needs none.
    """
    lengths = torch.tensor([trace.own for trace in traces])
    for trace, weight in zip(traces, token_weights(lengths, most_own, loss), strict=True):
        trace.weight = weight.item()
    sums = dict.fromkeys(("loss", "kl", "entropy", "clipped"), 0.0)
    for group in alike(traces, policy.most_tokens):
        new, entropy = policy.log_probs(group)
        parts = [trace.own for trace in group]
        for trace, part in zip(group, new.detach().split(parts), strict=True):
            trace.old = part if trace.old is None else trace.old
        old = torch.cat([trace.old for trace in group])
        near = torch.cat([trace.reference for trace in group]) if beta else new.detach()
        advantage, weight = (_spread(group, name, parts, new) for name in ("advantage", "weight"))
        total = (token_losses(new, old, near, advantage, clip, beta) * weight).sum()
        total.backward()
        ratio = (new.detach() - old).exp()
        sums["loss"] += total.item()
        sums["kl"] += k3(new.detach(), near).sum().item()
        sums["entropy"] += entropy.sum().item()
        sums["clipped"] += ((ratio - 1).abs() > clip).sum().item()
    count = int(lengths.sum())
    return {"loss": sums.pop("loss"), **{name: value / count for name, value in sums.items()}}


def _spread(group: list[Trace], name: str, parts: list[int], like: Tensor) -> Tensor:
    """A number of each trace, at each of its own tokens."""
    values = torch.tensor([getattr(trace, name) for trace in group])
    return values.repeat_interleave(torch.tensor(parts)).to(like.device)
