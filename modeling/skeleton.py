"""A model with no weights in it, and its weights, a block at a time.

The skeleton is made by from_pretrained itself, so renamed tensors, fused experts, tied weights,
computed buffers and quantised layers are as they always are; only that every tensor it is given
stands for a place on disk and holds nothing. Later a block's tensors are put in through the same
conversion, and taken out again.
"""

import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from modeling.blocks import find_units
from modeling.checkpoint import BadCheckpoint, Checkpoint, Place

CPU = torch.device("cpu")
OUTSIDE = -1  # the index of the part that is no block: embedding, norm, head and what is shared


class CannotStream(ValueError):
    """A model that must be loaded whole; the message says why."""


class Unread:
    """Stands for a tensor on disk while the skeleton is built; moving it moves nothing."""

    def __init__(self, place: Place) -> None:
        self._tensor = torch.empty(place.shape, dtype=place.dtype, device="meta")
        self.dtype, self.shape = place.dtype, self._tensor.shape

    def __getitem__(self, _key: object) -> "Unread":
        return self

    def get_shape(self) -> list[int]:
        """The shape, as safetensors' slices give it."""
        return list(self.shape)

    def to(self, device: object = None, dtype: torch.dtype | None = None) -> Tensor:
        """An empty tensor of that type, on no device at all."""
        del device
        return self._tensor.to(dtype=dtype or self.dtype)


class Target(NamedTuple):
    """Where a checkpoint's tensor goes, and the pattern and conversion that take it there."""

    name: str  # the parameter or buffer; the first of them where it is cut up
    pattern: str | None
    converter: WeightConverter | None


@dataclass
class Skeleton:
    """A model whose parameters hold nothing until `fill` is called for their part.

    parts: block index (or OUTSIDE) -> names of the checkpoint's tensors.  targets: where each of
    them goes.  device: where all are put.
    """

    model: PreTrainedModel
    blocks: list[nn.Module]
    parts: dict[int, list[str]]
    targets: dict[str, Target]
    device: torch.device

    def __post_init__(self) -> None:
        self._loading = LoadStateDictConfig(
            device_map={"": self.device},
            dtype=self.model.dtype,
            dtype_plan=self.model._get_dtype_plan(self.model.dtype),
            hf_quantizer=getattr(self.model, "hf_quantizer", None),
            weight_mapping=_conversions(self.model),
        )
        self._empty = {
            index: [
                (module, name, parameter)
                for module in block.modules()
                for name, parameter in module._parameters.items()
                if parameter is not None and parameter.is_meta
            ]
            for index, block in enumerate(self.blocks)
        }
        places: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
        for module in self.model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    places[id(parameter)].append((module, name))
        self._users = places
        self._tied = [group for group in places.values() if len(group) > 1]

    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Put tensors in, by the names that the checkpoint gives them."""
        convert_and_load_state_dict_in_model(self.model, tensors, self._loading)
        for places in self._tied:
            held = (module._parameters[name] for module, name in places)
            filled = next((tensor for tensor in held if not tensor.is_meta), None)
            if filled is not None:
                for module, name in places:
                    module._parameters[name] = filled

    @property
    def fused(self) -> set[str]:
        """The checkpoint's tensors that the model holds joined with others, or cut up."""
        return {name for name, target in self.targets.items() if target.pattern}

    def used_by(self, parameter: nn.Parameter) -> list[nn.Module]:
        """The modules that share a parameter; to be asked before anything is filled."""
        return [module for module, _ in self._users[id(parameter)]]

    def stored_name(self, parameter: nn.Parameter) -> str | None:
        """The checkpoint's name of a parameter that is stored as it is; None for a fused one."""
        named = self.model.named_parameters(remove_duplicate=False)
        names = {name for name, other in named if other is parameter}
        plain = (name for name in self.parts.get(OUTSIDE, []) if name not in self.fused)
        return next((name for name in plain if self.targets[name].name in names), None)

    def set_absent(self, parameter: nn.Parameter) -> None:
        """Put NaN in a parameter's place, in no memory: should it be used, that is noticed."""
        nan = torch.full((), torch.nan, dtype=self.model.dtype, device=self.device)
        absent = nn.Parameter(nan.expand(parameter.shape), requires_grad=False)
        for module, name in self._users[id(parameter)]:
            module._parameters[name] = absent

    def empty(self, index: int) -> None:
        """Take a block's tensors out again."""
        for module, name, parameter in self._empty[index]:
            module._parameters[name] = parameter


def build_skeleton(
    kind: type[PreTrainedModel], config: object, checkpoint: Checkpoint, dtype: torch.dtype,
    device: torch.device = CPU,
) -> Skeleton:  # fmt: skip
    """Build a model of a class whose tensors stay on disk.

    dtype: what it is to compute in.  device: where.

    Raises BadCheckpoint when tensors are missing or have another shape than the model's, before
    any room is made for them.
    """
    transformers_logging.disable_progress_bar()  # of "Loading weights", once a block
    os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")  # no pool of threads for views
    state = {name: Unread(place) for name, place in checkpoint.tensors.items()}
    try:
        model, info = _refusing(kind, checkpoint).from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    except NotImplementedError as error:
        if "meta tensor" not in str(error):  # torch's word for: there are no values to copy
            raise
        raise CannotStream(
            f"a {config.model_type} cannot be streamed: transformers changes some of its tensors "
            "by their values while it loads them; it has to fit into memory"
        ) from error
    model.__class__ = kind
    _refuse_gaps(model, info["missing_keys"], info["mismatched_keys"], checkpoint)
    model.eval().requires_grad_(False)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)
    targets = _targets(model, checkpoint.tensors)
    return Skeleton(model, find_units(model), _parts(model, targets), targets, device)


def _refusing(kind: type[PreTrainedModel], checkpoint: Checkpoint) -> type[PreTrainedModel]:
    """The class, but it refuses gaps where transformers would make room for all that is missing:
    for a large model's configuration beside a small checkpoint, that would be all of the model."""

    def finalize(model: PreTrainedModel, loading: LoadStateDictConfig, info: Any) -> Any:
        tied = {**model.all_tied_weights_keys, **_reversed(model.all_tied_weights_keys)}
        ignored = model._keys_to_ignore_on_load_missing or ()
        missing = {
            name
            for name in info.missing_keys
            if tied.get(name, name) in info.missing_keys
            and not any(re.search(pattern, name) for pattern in ignored)
        }
        _refuse_gaps(model, missing, info.mismatched_keys, checkpoint)
        return kind._finalize_model_loading(model, loading, info)

    own = {"_finalize_model_loading": staticmethod(finalize), "__module__": kind.__module__}
    return type(kind.__name__, (kind,), own)


def _reversed(names: dict[str, str]) -> dict[str, str]:
    return {there: here for here, there in names.items()}


def _refuse_gaps(
    model: PreTrainedModel, missing: Collection[str], mismatched: Collection[tuple],
    checkpoint: Checkpoint,
) -> None:  # fmt: skip
    if missing:
        raise BadCheckpoint(
            f"{checkpoint.folder} lacks {len(missing)} tensors that {type(model).__name__} needs, "
            f"'{min(missing)}' among them; the configuration is of another model, or a file is gone"
        )
    if mismatched:
        name, found, wanted = min(mismatched)
        raise BadCheckpoint(
            f"{checkpoint.folder}: '{name}' is {tuple(found)}, the configuration says "
            f"{tuple(wanted)}; one of the two is of another model"
        )


def _conversions(model: PreTrainedModel) -> list:
    return get_model_conversion_mapping(model, None, getattr(model, "hf_quantizer", None))


def _targets(model: PreTrainedModel, names: Iterable[str]) -> dict[str, Target]:
    """Where each of the checkpoint's tensors goes that the model has a use for."""
    conversions = _conversions(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    known = model.state_dict()
    targets = {}
    for name in names:
        target, pattern = rename_source_key(
            name, renamings, converters, model.base_model_prefix, known
        )
        if target not in known and name in known:
            target, pattern = name, None
        if target in known:
            targets[name] = Target(target, pattern, by_pattern.get(pattern))
    return targets


def _parts(model: PreTrainedModel, targets: dict[str, Target]) -> dict[int, list[str]]:
    """Sort the checkpoint's tensors by block; one that several blocks share is OUTSIDE."""
    owners = _owners(model)
    parts: dict[int, list[str]] = defaultdict(list)
    for name, target in targets.items():
        parts[owners.get(target.name, OUTSIDE)].append(name)
    return dict(parts)


def _owners(model: PreTrainedModel) -> dict[str, int]:
    """Parameter or buffer name -> the one block that uses it; others are not in it."""
    inside: dict[int, set[int]] = defaultdict(set)  # module -> blocks
    for index, block in enumerate(find_units(model)):
        for module in block.modules():
            inside[id(module)].add(index)
    users: dict[int, set[int]] = defaultdict(set)  # tensor -> blocks
    ids: dict[str, int] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                ids[f"{prefix}.{name}" if prefix else name] = id(tensor)
                users[id(tensor)] |= inside.get(id(module), {OUTSIDE})
    return {
        name: next(iter(users[key]))
        for name, key in ids.items()
        if len(users[key]) == 1 and OUTSIDE not in users[key]
    }
