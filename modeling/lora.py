"""Low-rank adapters: put on a model, trained, kept as PEFT folders, and merged away again.

The only place that imports peft. Its format is what everybody else reads; what is added here:

- Targets are found by looking at which linear layers a forward pass really calls. A layer whose
  weight is used as a bare matrix (Mamba's dt_proj in transformers) would carry an adapter that
  never learns, and PEFT would not say so.
- `check_learning` refuses, after the first backward pass, adapters that got no gradient.
- Adapters have the type of the weights beside them (PEFT would make them float32, which is slow
  where bfloat16 has units of its own); stages/learning/training.py keeps float32 masters of them.

Variants: lora (Hu 2021), rslora (Kalajdzievski 2023: scale alpha / sqrt(rank)), dora (Liu 2024:
direction and magnitude apart), pissa (Meng 2024: starts at the principal singular values).
"""

import contextlib
import copy
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import ArrowConfig, LoraConfig, PeftModel, create_arrow_model, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from modeling.blocks import called_linear_layers, find_blocks

VARIANTS = ("lora", "rslora", "dora", "pissa")
PRINCIPAL = "pissa_niter_4"  # its fast singular value decomposition
REFERENCE = "reference"  # the name of an adapter that a policy is kept near to
NOT_FOR_MAMBA = ("out_proj",)  # PEFT refuses it: fused kernels read its weight themselves

Adapted = PeftModel  # a model that carries adapters


class DeadAdapter(RuntimeError):
    """Some adapters get no gradient: they would be trained in name only."""


@dataclass(frozen=True)
class AdapterShape:
    """What an adapter changes.

    targets: names of linear layers, as q_proj; empty takes all that carry one.
    last_blocks: how many blocks, counted from the end; 0 takes all.
    """

    rank: int
    alpha: float
    variant: str
    targets: tuple[str, ...] = ()
    last_blocks: int = 0


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers inside blocks that can carry an adapter."""
    _, blocks = find_blocks(model)
    mamba = any(type(module).__name__.endswith("MambaMixer") for module in blocks.modules())
    skipped = NOT_FOR_MAMBA if mamba else ()
    return [n for n in called_linear_layers(model) if n.rpartition(".")[2] not in skipped]


def adapt(model: PreTrainedModel, shape: AdapterShape, seed: int, start: Path) -> Adapted:
    """Put a new adapter on a model, in place; only it is trainable afterwards.

    start: a folder for what `save_adapter` needs of PiSSA's beginning; others leave it alone.
    Raises ValueError, naming what there is, for targets that the model does not have.
    """
    config = LoraConfig(
        r=shape.rank,
        lora_alpha=shape.alpha,
        target_modules=_targets(model, shape),
        use_rslora=shape.variant == "rslora",
        use_dora=shape.variant == "dora",
        init_lora_weights=PRINCIPAL if shape.variant == "pissa" else True,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    if shape.variant == "pissa":
        adapted.active_peft_config.init_lora_weights = True  # else it would be started again
        adapted.save_pretrained(start)
    return adapted.eval()


def _targets(model: PreTrainedModel, shape: AdapterShape) -> list[str]:
    place, blocks = find_blocks(model)
    first = len(blocks) - shape.last_blocks if shape.last_blocks else 0
    every = linear_layers(model)
    kinds = sorted({name.rpartition(".")[2] for name in every})
    if strange := sorted(set(shape.targets) - set(kinds)):
        raise ValueError(
            f"no adapter can be put on {', '.join(strange)}; {type(model).__name__} has "
            f"{', '.join(kinds)}"
        )
    if shape.last_blocks > len(blocks):
        raise ValueError(
            f"'last_blocks' is {shape.last_blocks}, but {type(model).__name__} has {len(blocks)}"
        )
    block_of = {name: int(name.removeprefix(f"{place}.").split(".")[0]) for name in every}
    if not every:
        raise ValueError(
            f"{type(model).__name__} has no linear layer inside its blocks that could carry an "
            "adapter"
        )
    wanted = shape.targets or kinds
    return [n for n in every if block_of[n] >= first and n.rpartition(".")[2] in wanted]


def trainable(adapted: Adapted) -> list[tuple[str, nn.Parameter]]:
    """What is learnt, by name: adapters, and experts that were put on after them."""
    return [(name, p) for name, p in adapted.named_parameters() if p.requires_grad]


def adapters_of(named: Iterable[tuple[str, nn.Parameter]]) -> list[tuple[str, nn.Parameter]]:
    """Those of some named parameters that are adapters'."""
    return [(name, p) for name, p in named if ".lora_" in name]


def check_learning(named: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Refuse, after a backward pass, adapters that learn nothing. Raises DeadAdapter.

    Of the two factors one starts at zero, which makes the other's first gradient zero: so a layer
    learns when all its parameters have a gradient and one of them is not zero.
    """
    learns: dict[str, list[bool | None]] = {}
    for name, parameter in named:
        layer = name.partition(".lora_")[0]
        gradient = parameter.grad
        learns.setdefault(layer, []).append(None if gradient is None else bool(gradient.any()))
    dead = [layer for layer, found in learns.items() if None in found or not any(found)]
    if dead:
        raise DeadAdapter(
            f"{len(dead)} of {len(learns)} adapted layers get no gradient (the first: {dead[0]}); "
            "the model does not call them as modules: leave them out of 'targets'"
        )


def save_adapter(adapted: Adapted, folder: Path, start: Path | None = None) -> None:
    """Write adapter_model.safetensors and adapter_config.json, for the model as it was before.

    PiSSA took its start out of the model's weights; it is written as the plain adapter of twice the
    rank that makes up the difference (PEFT's conversion). start: the folder that `adapt` was given;
    None for an adapter that was opened.
    """
    has_start = start is not None and (start / "adapter_config.json").is_file()
    adapted.save_pretrained(
        folder,
        selected_adapters=[adapted.active_adapter],
        path_initial_model_for_weight_conversion=str(start) if has_start else None,
    )
    (folder / "README.md").unlink()  # PEFT's empty model card
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = None  # the folder it lay in, which may move
    config["target_modules"].sort()  # of a set, whose order is another in each process
    written = json.dumps(config, indent=2, sort_keys=True)
    (folder / "adapter_config.json").write_text(written, encoding="utf-8")


@contextlib.contextmanager
def merged(adapted: Adapted) -> Iterator[PreTrainedModel]:
    """The model with the adapter added to its weights, for as long as the context lasts.

    Weights are put back from a copy, to the bit; PEFT would subtract, which rounds.
    """
    kept = {
        name: module.weight.detach().clone()
        for name, module in adapted.named_modules()
        if hasattr(module, "base_layer") and isinstance(module.base_layer, nn.Linear)
    }
    adapted.merge_adapter()
    try:
        yield adapted.get_base_model()
    finally:
        adapted.unmerge_adapter()
        for name, weight in kept.items():
            adapted.get_submodule(name).base_layer.weight.data.copy_(weight)


def open_adapted(model: PreTrainedModel, folder: Path, trains: bool = False) -> Adapted:
    """Put a finished adapter on the model it was made for, in place.

    Raises FileNotFoundError for a folder without one.
    """
    if not (folder / "adapter_config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no adapter (adapter_config.json is missing)")
    adapted = PeftModel.from_pretrained(
        model, folder, is_trainable=trains, autocast_adapter_dtype=False, local_files_only=True
    )
    return adapted.eval()


def keep_reference(adapted: Adapted, folder: Path) -> None:
    """Add a finished adapter that is only compared with, under the name REFERENCE."""
    adapted.load_adapter(folder, REFERENCE, is_trainable=False, autocast_adapter_dtype=False)


@contextlib.contextmanager
def as_reference(adapted: Adapted) -> Iterator[None]:
    """Let the model be as the reference has it, for as long as the context lasts."""
    own = adapted.active_adapter
    adapted.set_adapter(REFERENCE, inference_mode=True)
    try:
        yield
    finally:
        adapted.set_adapter(own)


def open_merged(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model with a finished adapter added to its weights: a stock model again."""
    return open_adapted(copy.deepcopy(model), folder).merge_and_unload()


def open_arrow(model: PreTrainedModel, folders: Sequence[Path]) -> PreTrainedModel:
    """Put adapters on a model, in place, that Arrow mixes for each token (Ostapenko 2024).

    Of each layer a token gets the three whose first singular vector it is most along. Raises
    ValueError where PEFT cannot: no adapters, or adapters of unlike ranks or layers.
    """
    config = ArrowConfig(top_k=max(1, min(3, len(folders))), rng_seed=0)
    return create_arrow_model(model, list(map(str, folders)), config).eval().get_base_model()
