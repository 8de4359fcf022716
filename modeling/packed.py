"""Find the weights that a checkpoint stores quantised, and what each is unpacked from.

    checkpoint, config = open_packed(read_checkpoint(folder), config, torch.bfloat16)

gives the checkpoint of the plain model: a weight and its scales become one tensor, Packed, with the
weight's own name and shape. So the skeleton is that of the plain model, and needs neither the
library that quantised it nor a GPU; a block is unpacked when it is put in (dequantise.py).

Only weights are unpacked. What a quantised model does to its activations while it runs (int8 or FP8
products) is not done: they stay in the type that is computed in.
"""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from modeling.checkpoint import BadCheckpoint, Checkpoint, Packed, Place
from modeling.packings import FP8, PACKINGS


def open_packed(
    checkpoint: Checkpoint, config: PreTrainedConfig, dtype: torch.dtype
) -> tuple[Checkpoint, PreTrainedConfig]:
    """The checkpoint and the configuration of the plain model that a quantised one stands for.

    dtype: what weights are unpacked to. A checkpoint that is not quantised comes back as it is.
    Raises BadCheckpoint, naming the tensor, and ValueError for a form that is not read.
    """
    settings = _settings(config)
    if settings is None:
        _refuse_rest(checkpoint.tensors, "config.json states no quantization_config")
        return checkpoint, config
    method = settings.get("quant_method")
    if method is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        method = "bitsandbytes"  # which did not write it at first
    if method not in PACKINGS:
        raise ValueError(
            f"{checkpoint.folder} is quantised with '{method}', which is not read (read are "
            f"{', '.join(PACKINGS)}); take the model as it was before it, or in one of these forms"
        )
    found = dict(PACKINGS[method](checkpoint.tensors, settings, dtype))
    parts = set(stored_places(found)).union(*(packed.beside for packed in found.values()))
    plain = {name: place for name, place in checkpoint.tensors.items() if name not in parts}
    _refuse_rest(plain, "it has no scales, or they have another name")
    order = {name: None for name in checkpoint.tensors if name in plain or name in found}
    return Checkpoint(checkpoint.folder, order | plain | found), _plain(config)


def stored_places(tensors: Mapping[str, Place | Packed]) -> dict[str, Place]:
    """What is to be read for some tensors."""
    places: dict[str, Place] = {}
    for name, tensor in tensors.items():
        places.update(tensor.stored if isinstance(tensor, Packed) else {name: tensor})
    return places


def unpack(
    tensors: Mapping[str, Place | Packed], stored: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Tensors from what was read for them; those that are not packed are handed on."""
    return {
        name: place.unpack(*(stored[part] for part in place.stored))
        if isinstance(place, Packed)
        else stored[name]
        for name, place in tensors.items()
    }


def _settings(config: PreTrainedConfig) -> dict | None:
    for part in (config, config.get_text_config()):
        found = getattr(part, "quantization_config", None)
        if found is not None:
            return found if isinstance(found, dict) else found.to_dict()
    return None


def _plain(config: PreTrainedConfig) -> PreTrainedConfig:
    config = copy.deepcopy(config)
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return config


def _refuse_rest(places: Mapping[str, Place], why: str) -> None:
    """Refuse weights of one byte or less, which mean nothing by themselves."""
    for name, place in places.items():
        halves = place.dtype == torch.uint8 and name.endswith((".weight", "_blocks", "_scales"))
        if halves or place.dtype in (*FP8, torch.int8):
            raise BadCheckpoint(
                f"{place.file}: '{name}' is {place.dtype}, which has to be unpacked, but {why}; "
                "fetch the checkpoint again, with its config.json"
            )
