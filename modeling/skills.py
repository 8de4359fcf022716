"""What a skill is made of: a low-rank adapter and, where it has one, a mini mixture of experts.

A skill's folder holds a PEFT adapter and, beside it, experts.safetensors and experts.json. It says
all there is to say: no code is loaded from it.
"""

import copy
from pathlib import Path

from transformers import PreTrainedModel

from modeling.lora import Adapted, open_adapted, open_merged, save_adapter
from modeling.moe import CONFIG, find_experts, open_experts, save_experts


def save_skill(adapted: Adapted, folder: Path, start: Path | None = None) -> None:
    """Write a model's adapter, as `save_adapter` does, and its experts, if it has any."""
    save_adapter(adapted, folder, start)
    if (experts := find_experts(adapted)) is not None:
        save_experts(experts, folder)


def open_skill(
    model: PreTrainedModel, folder: Path, trains: bool = False, experts_train: bool | None = None
) -> Adapted:
    """Put a finished skill on the model it was made for, in place.

    experts_train: as `trains`, unless it is said; experts that stay as they are, while the adapter
    learns, leave a reference that differs in the adapter alone.
    """
    adapted = open_adapted(model, folder, trains)
    if (folder / CONFIG).is_file():
        open_experts(model, folder, trains if experts_train is None else experts_train)
    return adapted


def open_skilled(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """A model with a finished skill in it, to use: the adapter added to the weights of a copy."""
    skilled = open_merged(copy.deepcopy(model), folder)
    if (folder / CONFIG).is_file():
        open_experts(skilled, folder)
    return skilled
