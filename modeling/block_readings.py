"""What each structural block of a model did on every token, from one forward and backward pass.

A block's activation x (modeling/block_sites.py) and the gradient g = dL/dx of the same tensor, L
the sum of the cross-entropies of all next tokens, give for every token

    activation  |x|        gradient  |g|        taylor  <x, g>

Cutting the block would change L by - <x, g> to first order (Molchanov 2019).

Weights may be frozen or quantised: gradients flow to activations alone, and weights get none.

Letters: B rows, T tokens a row, N blocks of a site.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from modeling.block_sites import Site
from modeling.blocks import dissect
from modeling.losses import text_loss


@dataclass(frozen=True)
class Reading:
    """What the blocks of a site did: (B, T, N) float32 each; 0 where there is padding."""

    activation: Tensor
    gradient: Tensor
    taylor: Tensor  # signed

    def of(self, tokens: Tensor) -> "Reading":
        """Of some tokens alone, (B, T) bool: (tokens, N) each."""
        return Reading(self.activation[tokens], self.gradient[tokens], self.taylor[tokens])


def read_blocks(
    model: PreTrainedModel,
    tokens: Tensor,
    sites: Sequence[Site],
    real: Tensor | None = None,
) -> tuple[float, list[Reading]]:
    """The loss in nats, summed over next tokens, and a reading a site.

    tokens: (B, T) int64.  real: (B, T) bool; False behind a row's end.
    """
    real = torch.ones_like(tokens, dtype=torch.bool) if real is None else real
    found: dict[int, Reading] = {}
    hooks = [
        model.get_submodule(site.module).register_forward_pre_hook(_watch(place, site, real, found))
        for place, site in enumerate(sites)
    ]
    embedding = model.get_input_embeddings()
    hooks.append(embedding.register_forward_hook(lambda _m, _i, out: out.requires_grad_(True)))
    try:
        with frozen(model), torch.enable_grad():
            loss = summed_loss(model, tokens, real)
            loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    return loss.item(), [found[place] for place in range(len(sites))]


def summed_loss(model: PreTrainedModel, tokens: Tensor, real: Tensor) -> Tensor:
    """The sum of the cross-entropies of all next tokens that are real.

    Without the logits of all tokens at once where they are a plain product with the head's weight;
    by the model's own logits where it does more with them (Gemma 2's caps, Granite's factors).
    """
    counted, labels = real[:, 1:], tokens[:, 1:]
    if not _head_is_plain(model, tokens[:1, :2]):
        logits = model(tokens, use_cache=False).logits[:, :-1][counted]
        return cross_entropy(logits.float(), labels[counted], reduction="sum")
    states = model.base_model(tokens, use_cache=False).last_hidden_state[:, :-1][counted]
    weight = dissect(model).head.weight.detach()
    return text_loss(states.to(weight.dtype), weight, labels[counted]) * len(states)


@torch.no_grad()
def _head_is_plain(model: PreTrainedModel, tokens: Tensor) -> bool:
    """Whether a model's logits of some tokens are its last states times its head's weight."""
    own = model(tokens, use_cache=False).logits
    states = model.base_model(tokens, use_cache=False).last_hidden_state
    weight = dissect(model).head.weight
    plain = states.to(weight.dtype) @ weight.T
    return plain.shape == own.shape and torch.allclose(
        plain, own.to(plain.dtype), rtol=1e-3, atol=1e-3
    )


def _watch(place: int, site: Site, real: Tensor, found: dict[int, Reading]):
    """A hook in front of a site that takes its reading when the gradient comes by."""

    def watch(_: nn.Module, given: tuple[Tensor]) -> None:
        if not torch.is_grad_enabled():  # a pass that is not the one to read
            return
        again = _recomputed(given[0])

        def take(gradient: Tensor) -> None:
            hook.remove()  # it holds what holds it
            found[place] = _read(again(), gradient, site.size, real)

        hook = given[0].register_hook(take)

    return watch


def _recomputed(x: Tensor) -> Callable[[], Tensor]:
    """A way to x in the backward pass, at its place: a product is made again of its factors.

    Autograd keeps these anyway, while x, before a frozen linear layer, would be kept for us alone.
    """
    made_by = x.grad_fn
    if type(made_by).__name__ == "MulBackward0" and x.shape == made_by._saved_self.shape:
        return lambda: made_by._saved_self.detach() * made_by._saved_other.detach()
    kept = x.detach()
    return lambda: kept


def _read(x: Tensor, gradient: Tensor, size: int, real: Tensor) -> Reading:
    """The reading of (B, T, N size) activations and gradients."""
    shape = (*real.shape, -1, size)
    x, gradient = x.reshape(shape).float(), gradient.reshape(shape).float()
    where = real[..., None]
    return Reading(
        torch.linalg.vector_norm(x, dim=-1) * where,
        torch.linalg.vector_norm(gradient, dim=-1) * where,
        (x * gradient).sum(-1) * where,
    )


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Let no weight of a model ask for a gradient, for as long as the context lasts."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
