"""Protected subspaces: keep what a network has learnt while it learns something else.

Gradient Projection Memory (Saha 2021, arXiv 2103.09762). The gradient of a linear layer's weight,
(out, in), is a sum of outer products with the layer's inputs, so a step that is orthogonal to the
inputs of an earlier skill changes none of the layer's answers to them:

    U <- U - (U B) B^T        B (in, r): an orthonormal basis of the inputs that earlier skills use

B is found from the second moment of the inputs on the earlier skill's rows, and extended after
each skill by what is new in it. Differs from the paper, which has plain SGD and SVD of sampled
activations: moments are exact sums over all tokens, and with Adam, whose division by element turns
a projected gradient back out of the complement, the step itself is to be projected
(stages/learning/training.py does both).

Covered: nn.Linear weights. Not covered: norms, biases, embeddings, experts kept as one tensor; they
have no such subspace and have to stay as they are while a skill is protected. Inputs outside of B,
the share that was not retained, are not protected either, and with weights in bfloat16 a step is
exact only up to their rounding.
"""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

Bases = dict[str, Tensor]  # name of a layer -> (in, r) float32, orthonormal columns


def linear_layers(module: nn.Module, prefix: str = "") -> dict[str, nn.Linear]:
    """All linear layers in a module, by their names behind `prefix`."""
    found = module.named_modules(prefix=prefix)
    return {name: layer for name, layer in found if isinstance(layer, nn.Linear)}


class InputMoments:
    """The second moment of each layer's inputs, sum of x x^T over all tokens; (in, in) float64."""

    def __init__(self, layers: Mapping[str, nn.Linear]) -> None:
        self.layers = dict(layers)
        self.sums = {
            name: torch.zeros(layer.in_features, layer.in_features, dtype=torch.float64)
            for name, layer in self.layers.items()
        }

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Take in every input that a layer gets until the block ends."""
        handles = [
            layer.register_forward_pre_hook(self._taking(name))
            for name, layer in self.layers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _taking(self, name: str):
        def take(_layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            flat = inputs[0].detach().flatten(0, -2).float()  # (N, in)
            self.sums[name] += (flat.T @ flat).double().cpu()

        return take


def extend_basis(basis: Tensor | None, moment: Tensor, share: float, most: int) -> Tensor:
    """Add to a basis what a skill's inputs need beyond it: (in, r) -> (in, r + new).

    basis: of earlier skills, or None.  moment (in, in): of the inputs.  share: of the inputs' sum
    of squares that the result holds, the criterion of Saha 2021, equation 9.  most: new directions
    at most, the budget; where it is too small, the leading ones are kept.
    Raises ValueError for a moment that is not finite or is zero: no input was seen.
    """
    total = moment.trace()
    if not torch.isfinite(total) or total <= 0:
        raise ValueError(
            f"the inputs' sum of squares is {total.item():g}; no finite input was seen"
        )
    width = len(moment)
    basis = moment.new_zeros(width, 0) if basis is None else basis.to(moment)
    outside = project(project(moment, basis).T, basis)  # (in, in), both sides
    values, directions = torch.linalg.eigh((outside + outside.T) / 2)  # smallest first
    values, directions = values.flip(0).clamp_min(0), directions.flip(1)
    held = total - values.sum() + values.cumsum(0)  # by the basis and the first 1, 2, ... new ones
    already = total - values.sum() >= share * total
    needed = 0 if already else int((held < share * total).sum()) + 1
    count = min(needed, most, width - basis.shape[1])
    whole = torch.cat([basis, directions[:, :count]], 1)
    return torch.linalg.qr(whole)[0].float() if count else basis.float()


def project(update: Tensor, basis: Tensor) -> Tensor:
    """Take out of a gradient or step, (..., in), what acts on protected inputs: U - (U B) B^T."""
    basis = basis.to(update)
    return update - (update @ basis) @ basis.T


def extend_all(bases: Bases, moments: InputMoments, share: float, most: int) -> Bases:
    """`extend_basis` for every layer that was watched; the bases given are left as they are."""
    extended = {
        name: extend_basis(bases.get(name), moment, share, most)
        for name, moment in moments.sums.items()
    }
    return {**bases, **extended}


def protected_share(bases: Bases) -> float:
    """Mean over layers of the share of input directions that are protected; 1: nothing can move."""
    return sum(basis.shape[1] / basis.shape[0] for basis in bases.values()) / len(bases)
