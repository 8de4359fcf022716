"""A PEFT folder with a LoRA adapter, read as plain tensors for the model it was made for.

    found = inspect_adapter(folder, layer_sizes(model))     # reads no weights
    adapter = found.read(model.dtype, model.device)

Taken are lora and rslora of linear layers. What has another formula (dora, biases, experts beside
the adapter, layers trained whole, ...) is refused by name: served as lora it would say something
else than it was trained to. An adapter written from PiSSA by modeling/lora.py is plain lora.

Letters: D inputs and F outputs of a layer, r rank.
"""

import json
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from modeling.blocks import called_linear_layers

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
EXPERTS = "experts.json"  # modeling/moe.py's, beside an adapter
PREFIX = "base_model.model."  # PEFT's, before the name of a layer
DOWN, UP = ".lora_A.weight", ".lora_B.weight"
OTHER_FORMULAS = (  # fields of PEFT's configuration that make more, or less, than lora of it
    "use_dora", "lora_bias", "use_qalora", "use_bdlora", "velora_config", "monteclora_config",
    "kasa_config", "arrow_config", "alora_invocation_tokens", "layer_replication", "alpha_pattern",
    "modules_to_save", "trainable_token_indices", "target_parameters", "fan_in_fan_out",
)  # fmt: skip
FRESH_STARTS = (True, False, "gaussian", "eva", "orthogonal")  # others change the model's weights

Sizes = dict[str, tuple[int, int]]  # (D, F) by the name of a layer


class NotPlain(ValueError):
    """An adapter that may be sound, but is of a kind that is not served several at once."""


@dataclass(frozen=True)
class LowRank:
    """What an adapter adds to a linear layer's result: scale (x down) up.

    Laid out as products of a few rows are fastest: PEFT's A and B, transposed.
    """

    down: Tensor  # (D, r)
    up: Tensor  # (r, F)
    scale: float


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter in memory, by the names of the layers that it changes."""

    layers: dict[str, LowRank]


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter's folder that fits a model, before its weights are read."""

    folder: Path
    ranks: dict[str, int]  # by layer
    parameters: int
    alpha: float
    rslora: bool

    @property
    def rank(self) -> int:
        """The largest of any layer."""
        return max(self.ranks.values())

    def bytes_as(self, dtype: torch.dtype) -> int:
        """What its tensors take in memory."""
        return self.parameters * dtype.itemsize

    def read(self, dtype: torch.dtype, device: torch.device) -> Adapter:
        """Its tensors, in the type of the model's and where that is."""
        with safe_open(self.folder / WEIGHTS, "pt") as file:

            def transposed(name: str) -> Tensor:
                return file.get_tensor(PREFIX + name).T.to(device, dtype).contiguous()

            return Adapter({
                layer: LowRank(transposed(layer + DOWN), transposed(layer + UP), self._scale(rank))
                for layer, rank in self.ranks.items()
            })  # fmt: skip

    def _scale(self, rank: int) -> float:
        return self.alpha / (sqrt(rank) if self.rslora else rank)


def layer_sizes(model: PreTrainedModel) -> Sizes:
    """The linear layers of a model that an adapter can be served on: those that a pass calls.

    Raises ValueError for a model that carries adapters of PEFT's itself.
    """
    names = called_linear_layers(model)
    if carried := [name for name in names if name.endswith(".base_layer")]:
        raise ValueError(
            f"{carried[0].removesuffix('.base_layer')} carries an adapter of PEFT's already; give "
            "the model as it was before (unload(), or merge_and_unload() to keep what it learnt)"
        )
    layers: dict[str, nn.Linear] = {name: model.get_submodule(name) for name in names}
    return {name: (layer.in_features, layer.out_features) for name, layer in layers.items()}


def inspect_adapter(folder: Path, sizes: Sizes) -> AdapterFolder:
    """Check an adapter's folder against a model's layers, without reading its weights.

    Raises FileNotFoundError for a folder without one, NotPlain for one that is no plain lora, and
    ValueError, naming what is wrong, for one that is damaged or does not fit the model.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no adapter ({name} is missing)")
    config = _plain_config(folder)
    shapes = _shapes_in(folder)
    strange = [name for name in shapes if not name.endswith((DOWN, UP))]
    if strange or not shapes:
        raise ValueError(
            f"{folder} holds {_some(strange) or 'no tensors'}; only lora_A.weight and "
            "lora_B.weight of linear layers are served"
        )
    layers = sorted({name.removesuffix(DOWN).removesuffix(UP) for name in shapes})
    if unknown := [layer for layer in layers if layer not in sizes]:
        raise ValueError(
            f"{folder} changes {_some(unknown)}, which the model has not, or does not call as a "
            f"linear layer of a block; it has {_some(list(sizes))}"
        )
    return AdapterFolder(
        folder=folder,
        ranks={layer: _rank(folder, layer, shapes, sizes[layer]) for layer in layers},
        parameters=sum(rows * columns for rows, columns in shapes.values()),
        alpha=float(config["lora_alpha"]),
        rslora=bool(config.get("use_rslora")),
    )


def _plain_config(folder: Path) -> dict[str, Any]:
    """The configuration. Raises NotPlain, naming each reason, unless it is that of plain lora."""
    if (folder / EXPERTS).is_file():
        raise NotPlain(
            f"{folder} holds experts beside its adapter ({EXPERTS}); they sit behind a block, for "
            "all rows: open it alone (modeling/skills.py, open_skilled)"
        )
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG} is no JSON: {error}") from error
    reasons = {key: config[key] for key in OTHER_FORMULAS if config.get(key)}
    if config.get("peft_type") != "LORA":
        reasons["peft_type"] = config.get("peft_type")
    if config.get("bias", "none") != "none":
        reasons["bias"] = config["bias"]
    if config.get("init_lora_weights", True) not in FRESH_STARTS:
        reasons["init_lora_weights"] = config["init_lora_weights"]
    if reasons:
        found = ", ".join(f"{key} is {value!r}" for key, value in reasons.items())
        raise NotPlain(
            f"{folder} is no plain lora of linear layers: {found}. Several at once are served of "
            "lora and rslora; merge this one into a model of its own (modeling/lora.py)"
        )
    return config


def _shapes_in(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in the file, without PEFT's prefix."""
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged: {error}") from error
    return {name.removeprefix(PREFIX): shape for name, shape in shapes.items()}


def _rank(
    folder: Path, layer: str, shapes: dict[str, tuple[int, ...]], size: tuple[int, int]
) -> int:
    """The rank of a layer's two tensors. Raises ValueError unless both fit it and each other."""
    down, up = shapes.get(layer + DOWN), shapes.get(layer + UP)
    inputs, outputs = size
    rank = down[0] if down else 0
    if rank < 1 or down != (rank, inputs) or up != (outputs, rank):
        raise ValueError(
            f"{folder} does not fit {layer}, which is {inputs} -> {outputs}: lora_A has the shape "
            f"{down}, lora_B {up}; they must be (rank, {inputs}) and ({outputs}, rank)"
        )
    return rank


def _some(names: list[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
