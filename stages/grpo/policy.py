"""Learn from answers that were rewarded: one update of the policy, GRPO's step 4.

A trace is a prompt and an answer with its advantage. Traces with a prompt in common are computed
together, the prompt once (modeling/shared_prefixes.py); in a model that does not allow it, traces
of about equal lengths, padded behind. Logits are made for the policy's own tokens alone, what tools
answered is read but never learnt.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modeling.lora import Adapted, as_reference
from modeling.shared_prefixes import forest_states, shares_prefixes
from modeling.token_log_probs import token_log_probs
from stages.grpo.objective import k3, token_losses, token_weights
from stages.learning.supervision import Example, alike, make_rows, share, side_by_side


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
    shares: bool  # a prompt is computed once for all answers to it

    @classmethod
    def of(cls, adapted: Adapted, pad: int, most_tokens: int, temperature: float) -> Self:
        """The policy that computes least for a model: whether it shares is found by trying."""
        shares = shares_prefixes(adapted.get_base_model())
        return cls(adapted, pad, most_tokens, temperature, shares)

    @property
    def model(self) -> PreTrainedModel:
        """The model that carries the adapters."""
        return self.adapted.get_base_model()

    def log_probs(self, traces: Sequence[Trace]) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies of the own tokens of traces, one behind the other."""
        head = self.model.get_output_embeddings().weight
        states, chosen = self._own([trace.example for trace in traces])
        return token_log_probs(states.to(head.dtype), head, chosen, self.temperature)

    def batches(self, traces: Sequence[Trace]) -> list[list[Trace]]:
        """Traces that are computed together, about `most_tokens` at a time."""
        if not self.shares:
            return alike(traces, self.most_tokens)
        groups = side_by_side([trace.example for trace in traces], self.most_tokens)
        return [[traces[index] for index in group] for group in groups]

    def _own(self, examples: list[Example]) -> tuple[Tensor, Tensor]:
        """The states that own tokens are drawn from, (M, D), and these tokens, (M,)."""
        device = self.model.device
        if self.shares:
            rows = share(examples)
            states = forest_states(self.model, rows.forest)
            return states.index_select(0, rows.before.to(device)), rows.labels.to(device)
        padded = make_rows([[example] for example in examples], self.pad)
        tokens, counted = padded.tokens.to(device), padded.counted[:, 1:].to(device)
        hidden = self.model.base_model(tokens, use_cache=False).last_hidden_state
        return hidden[:, :-1][counted], tokens[:, 1:][counted]


@torch.no_grad()
def look_back(policy: Policy, traces: list[Trace], beta: float) -> None:
    """Fill in what the traces' tokens had for probabilities in the reference."""
    for group in policy.batches(traces):
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
    for group in policy.batches(traces):
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
