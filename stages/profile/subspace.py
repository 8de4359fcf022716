"""Principal subspaces of block outputs, from a running covariance, and a control for them.

The covariance is accumulated exactly (float64 sums over all tokens): no batch is refitted or
forgotten. Differs from NIWT's stage 3, an SVD of a mask's outer product, which has rank 1.
"""

import torch
from torch import Tensor


class RunningCovariance:
    """Sums from which the mean and covariance of one block's output follow."""

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.total = torch.zeros(width, dtype=torch.float64, device=device)
        self.products = torch.zeros(width, width, dtype=torch.float64, device=device)

    def add(self, state: Tensor) -> None:
        """Take in one batch of outputs: (B, T, D)."""
        flat = state.flatten(0, -2).float()  # (B T, D)
        self.total += flat.double().sum(0)
        self.products += (flat.T @ flat).double()
        self.count += len(flat)

    def principal(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean (D,), directions (D, D) in columns, and variances (D,), largest first; float32.

        They are on the CPU, and computed there: eigh is the same on every machine of a kind.
        """
        mean = self.total.cpu() / self.count
        covariance = self.products.cpu() / self.count - mean[:, None] * mean[None, :]
        variance, directions = torch.linalg.eigh(covariance)
        flipped = directions.flip(-1).float(), variance.flip(-1).clamp_min(0).float()
        return mean.float(), *flipped


def rank_holding(variance: Tensor, share: float) -> int:
    """How many leading directions hold `share` of the variance: (D,) -> count."""
    cumulative = variance.double().cumsum(0) / variance.double().sum()
    return int((cumulative < share).sum()) + 1


def project(hidden: Tensor, mean: Tensor, basis: Tensor) -> Tensor:
    """Keep only what lies in a subspace: mean (D,), orthonormal basis (D, R)."""
    mean, basis = mean.to(hidden.device), basis.to(hidden.device)
    centred = hidden.float() - mean
    return (mean + centred @ basis @ basis.T).to(hidden.dtype)


def random_basis(width: int, rank: int, seed: int) -> Tensor:
    """An orthonormal basis of a random subspace, (D, R): the control that a real one must beat."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, rank, generator=generator))[0]
