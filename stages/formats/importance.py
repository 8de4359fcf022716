"""Block importance: what `profile` found out about each block of a teacher.

    importance.json        a list of BlockImportance, in the order of the blocks
    subspaces.safetensors  mean (L, D), basis (L, D, R), variance (L, D), float32

L blocks, D hidden width, R stored directions. `basis[l]` holds the R leading principal directions
of block l's output, `variance[l]` all D eigenvalues, largest first.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


@dataclass(frozen=True)
class BlockImportance:
    """How much one block matters, measured in two ways, and how wide its output is.

    harm: mean KL(whole model || model without this block), nats a token, with a 95 % interval.
    influence: 1 - mean cosine of the block's input and output (ShortGPT, Men 2024).
    rank_90, rank_95, rank_99: principal directions that hold that share of its output's variance.
    """

    block: int
    harm: float
    harm_low: float
    harm_high: float
    influence: float
    rank_90: int
    rank_95: int
    rank_99: int


@dataclass(frozen=True)
class Subspaces:
    """The principal subspace of each block's output; see the module for shapes."""

    mean: Tensor
    basis: Tensor
    variance: Tensor

    def to(self, device: torch.device) -> "Subspaces":
        """The same on a device."""
        return Subspaces(*(tensor.to(device) for tensor in vars(self).values()))

    def whiten(self, block: int, hidden: Tensor) -> Tensor:
        """Coordinates of unit variance in the block's subspace: (..., D) -> (..., R) float32.

        Whitened, because one direction of massive activations would otherwise outweigh all others.
        """
        scale = self.variance[block, : self.basis.shape[-1]].clamp_min(1e-6).rsqrt()
        axes = (self.basis[block] * scale).to(hidden.device)
        return (hidden.float() - self.mean[block].to(hidden.device)) @ axes


def write_importance(folder: Path, blocks: list[BlockImportance], subspaces: Subspaces) -> None:
    """Write both files."""
    text = json.dumps([asdict(block) for block in blocks], indent=1)
    (folder / "importance.json").write_text(text, encoding="utf-8")
    tensors = {key: value.contiguous() for key, value in vars(subspaces).items()}
    save_file(tensors, folder / "subspaces.safetensors")


def read_importance(folder: Path) -> list[BlockImportance]:
    """Read importance.json."""
    text = (folder / "importance.json").read_text(encoding="utf-8")
    return [BlockImportance(**entry) for entry in json.loads(text)]


def read_subspaces(folder: Path) -> Subspaces:
    """Read subspaces.safetensors."""
    return Subspaces(**load_file(folder / "subspaces.safetensors"))


def share_of_depth(depth: float, blocks: int) -> int:
    """Turn a depth between 0 and 1 into a number of blocks: 1/3 of 30 blocks is 10."""
    return round(depth * blocks)


def bootstrap_interval(rows: Tensor, resamples: int, seed: int) -> tuple[float, float]:
    """The 95 % interval of a mean by resampling rows, which keeps dependent tokens together.

    rows: one mean a row of text, (N,).  Percentile bootstrap (Efron 1979).
    """
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(rows), (resamples, len(rows)), generator=generator)
    means = rows.double()[picks].mean(-1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
