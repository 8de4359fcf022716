"""TrainState: everything that a training loop changes, saved and loaded as one.

Where weights are bfloat16, for the matrix units, the optimizer works on float32 master copies,
because a learning rate of 3e-4 is below bfloat16's resolution; a float32 weight is its own master.
"""

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from modeling.protection import Bases, project


class TrainState:
    """Trainable parameters with their float32 masters, AdamW (Loshchilov 2019) and a step count.

    bases: protected subspaces of layers' inputs, for parameters named LAYER.weight. Their gradients
    are projected, and then their steps too, since Adam's division by element turns them back.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        learning_rate: float,
        steps: int,
        bases: Bases | None = None,
    ) -> None:
        self.step = 0
        self.scale = 1.0  # of the learning rate; less after a loss has run away
        self.steps = steps
        self.learning_rate = learning_rate
        self._live = dict(parameters)
        for parameter in self._live.values():
            parameter.requires_grad_(True)
        self._masters = {  # a float32 weight is its own master
            name: parameter
            if parameter.dtype == torch.float32
            else nn.Parameter(parameter.detach().float())
            for name, parameter in self._live.items()
        }
        self._bases = {
            name: basis
            for layer, basis in (bases or {}).items()
            if (name := f"{layer}.weight") in self._masters
        }
        self._optimizer = torch.optim.AdamW(
            self._masters.values(),
            lr=learning_rate,
            betas=(0.9, 0.95),
            weight_decay=0.0,
            fused=True,
        )

    def update(self, warmup: float, clip: float) -> float:
        """Take one optimizer step with the gradients that are there; give their norm.

        warmup: share of all steps, then a cosine to a tenth of the rate.  clip: largest norm.
        Raises FloatingPointError for a gradient that is not finite; nothing is changed then.
        """
        for name, parameter in self._live.items():
            gradient, parameter.grad = parameter.grad.float(), None
            self._masters[name].grad = gradient
        for name, basis in self._bases.items():
            self._masters[name].grad = project(self._masters[name].grad, basis)
        norm = nn.utils.clip_grad_norm_(self._masters.values(), clip).item()
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"the gradient is {norm} at step {self.step + 1}; lower the learning rate "
                f"(now {self.learning_rate * self.scale:g})"
            )
        for group in self._optimizer.param_groups:
            rate = self.learning_rate * self.scale
            group["lr"] = rate * schedule(self.step, self.steps, warmup)
        before = {name: self._masters[name].detach().clone() for name in self._bases}
        self._optimizer.step()
        self._optimizer.zero_grad()
        for name, master in self._masters.items():
            if name in before:
                master.data = before[name] + project(master.data - before[name], self._bases[name])
        self.step += 1
        self._copy_to_live()
        return norm

    def pass_over(self) -> None:
        """Count a step that changes nothing, and forget its gradients."""
        for parameter in self._live.values():
            parameter.grad = None
        self.step += 1

    def save(self, folder: Path) -> None:
        """Write masters, both moments and the step as safetensors."""
        scale = torch.tensor(self.scale, dtype=torch.float64)
        tensors: dict[str, Tensor] = {"step": torch.tensor(self.step), "scale": scale}
        for name, master in self._masters.items():
            tensors[f"master.{name}"] = master.data
            for key, value in self._optimizer.state.get(master, {}).items():
                tensors[f"{key}.{name}"] = value
        save_file(tensors, folder / "train.safetensors")

    def load(self, folder: Path) -> None:
        """Take over what `save` wrote, to the bit."""
        tensors = load_file(folder / "train.safetensors")
        self.step, self.scale = int(tensors["step"]), float(tensors["scale"])
        for name, master in self._masters.items():
            master.data.copy_(tensors[f"master.{name}"])
            state = {key: tensors.get(f"{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
            if state["step"] is not None:
                self._optimizer.state[master] = state
        self._copy_to_live()

    @torch.no_grad()
    def _copy_to_live(self) -> None:
        for name, parameter in self._live.items():
            if parameter is not self._masters[name]:
                parameter.copy_(self._masters[name])


def schedule(step: int, steps: int, warmup: float) -> float:
    """Share of the learning rate at a step: linear warm-up, then a cosine down to a tenth."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    position = (step - rise) / max(1, steps - rise)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * position))
