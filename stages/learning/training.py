"""TrainState: everything that a training loop changes, saved and loaded as one.

Where weights are bfloat16, for the matrix units, the optimizer works on float32 master copies,
because a learning rate of 3e-4 is below bfloat16's resolution; a float32 weight is its own master.

In several processes (stages/ranks.py) each has all of it, and the same to the bit: they take the
same steps, with the mean of their gradients.
"""

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from modeling.protection import Bases, project
from stages.learning.optimizers import ADAMW, make_optimizer, state_of, take_state
from stages.ranks import ALONE, Ranks


class TrainState:
    """Trainable parameters with their float32 masters, an optimizer and a step count.

    bases: protected subspaces of layers' inputs, for parameters named LAYER.weight. Their gradients
    are projected, and then their steps too, since Adam's division by element turns them back.
    optimizer: a name in stages/learning/optimizers.py.  ranks: who trains together.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        learning_rate: float,
        steps: int,
        bases: Bases | None = None,
        optimizer: str = ADAMW,
        ranks: Ranks = ALONE,
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
        self._ranks = ranks
        self._bases = {
            name: basis.to(self._masters[name].device)
            for layer, basis in (bases or {}).items()
            if (name := f"{layer}.weight") in self._masters
        }
        self._optimizer = make_optimizer(optimizer, self._masters.values(), learning_rate)

    def update(self, warmup: float, clip: float) -> float:
        """Take one optimizer step with the gradients that are there; give their norm.

        warmup: share of all steps, then a cosine to a tenth of the rate.  clip: largest norm.
        Raises FloatingPointError for a gradient that is not finite; nothing is changed then.
        """
        for name, parameter in self._live.items():
            gradient, parameter.grad = parameter.grad.float(), None
            self._masters[name].grad = gradient
        self._ranks.average([master.grad for master in self._masters.values()])
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
        """Write masters, the optimizer's state and the step as safetensors."""
        scale = torch.tensor(self.scale, dtype=torch.float64)
        tensors: dict[str, Tensor] = {"step": torch.tensor(self.step), "scale": scale}
        for name, master in self._masters.items():
            tensors[f"master.{name}"] = master.data
            for key, value in state_of(self._optimizer, master).items():
                tensors[f"{key}.{name}"] = value
        save_file(tensors, folder / "train.safetensors")

    def load(self, folder: Path) -> None:
        """Take over what `save` wrote, to the bit."""
        tensors = load_file(folder / "train.safetensors")
        self.step, self.scale = int(tensors.pop("step")), float(tensors.pop("scale"))
        states: dict[str, dict[str, Tensor]] = {name: {} for name in self._masters}
        for place, tensor in tensors.items():
            key, _, name = place.partition(".")
            if key != "master":
                states[name][key] = tensor
        for name, master in self._masters.items():
            master.data.copy_(tensors[f"master.{name}"])
            take_state(self._optimizer, master, states[name])
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
