"""Optimizers by name, and their state as plain tensors that a checkpoint can hold.

    adamw        torch's, fused (Loshchilov 2019): two moments in float32, 8 bytes a weight
    adamw_8bit   bitsandbytes' (Dettmers 2022): both moments in 8 bits, in blocks of 256 weights
                 with a scale each; 2 bytes a weight. Tensors below 4,096 weights keep float32

Both work on the float32 masters of training.py. Measured with bitsandbytes 0.50 on a CPU,
where it works but is slow; not on a GPU yet.
"""

import importlib.util
from collections.abc import Iterable

import torch
from torch import Tensor, nn

BETAS = (0.9, 0.95)
ADAMW, ADAMW_8BIT = "adamw", "adamw_8bit"


def make_optimizer(
    name: str, parameters: Iterable[nn.Parameter], learning_rate: float
) -> torch.optim.Optimizer:
    """An optimizer without weight decay. Raises ValueError as `check_optimizer` does."""
    check_optimizer(name)
    if name == ADAMW:
        return torch.optim.AdamW(
            parameters, lr=learning_rate, betas=BETAS, weight_decay=0.0, fused=True
        )
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, lr=learning_rate, betas=BETAS, weight_decay=0.0)


def check_optimizer(name: str) -> None:
    """Raise ValueError for an optimizer that is unknown, or saying what it needs and lacks here."""
    if name not in (ADAMW, ADAMW_8BIT):
        raise ValueError(f"unknown optimizer '{name}'; use {ADAMW} or {ADAMW_8BIT}")
    if name == ADAMW_8BIT and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            "the optimizer 'adamw_8bit' needs bitsandbytes 0.50 or later, which is not installed: "
            ".venv/bin/pip install 'bitsandbytes>=0.50', or set distill.optimizer to adamw"
        )


def state_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """What an optimizer remembers of a parameter; empty before the first step.

    Tensors of their own: bitsandbytes has all parameters share its tables of values.
    """
    state = optimizer.state.get(parameter, {})
    return {
        key: value.clone() if key.startswith("qmap") else torch.as_tensor(value)
        for key, value in state.items()
    }


def take_state(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, state: dict[str, Tensor]
) -> None:
    """Put back what `state_of` gave, to the bit; an empty one forgets what there is."""
    if not state:
        optimizer.state.pop(parameter, None)
        return
    on_device = {key: value.to(parameter.device) for key, value in state.items()}
    if not isinstance(optimizer, torch.optim.AdamW):
        on_device["step"] = int(state["step"])  # bitsandbytes counts in Python
    optimizer.state[parameter] = on_device
