"""What tests of adapters share: adapters that change what a tiny model says, in folders."""

from pathlib import Path

import torch

from modeling.lora import AdapterShape, adapt, save_adapter


def adapter_folder(
    make, folder: Path, seed: int, variant: str = "lora", rank: int = 4, targets: tuple = ()
) -> Path:
    """An adapter for the model that `make` gives, written as PEFT does."""
    start = folder.with_name(f"{folder.name}-start")
    adapted = adapt(make(), AdapterShape(rank, 2.0 * rank, variant, targets), seed, start)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
    save_adapter(adapted, folder, start)
    return folder
