"""A mini mixture of experts behind one block: each token is computed by one of some small FFNs.

    experts = add_experts(model, ExpertsShape(12, 2, 32, 0.7, 0.01), tokens, seed=0)
    model(...)                             # the model's own forward, with a branch after block 12
    loss + balance_loss(model)             # read once after each forward pass; 0 without experts
    save_experts(experts, folder)          # experts.safetensors and experts.json
    open_experts(stock_model, folder)      # on the model it was made for; no code in the folder

For a token with the hidden state h behind the block, x = h / rms(h), and with e = argmax p,

    p = softmax((W x + b) / temperature)    h <- h + p_e V_e relu(U_e x)    (Switch, Fedus 2021)

V starts at zero, so that a new branch changes nothing; b starts so that W x + b is 0 on average:
states of a trained model have so much in common that W alone would send all tokens to one expert.
Only the chosen expert's products are computed. The load-balance loss is E sum_e f_e P_e, of the
share of tokens that expert e gets and its mean probability: 1, its least, when both are even.

It is a hook on the block of a stock model, and its parameters are the block's, under the name
`mini_moe`: they move, are copied and trained with it, and generate() runs it, with a cache too. The
seed counts 2 M parameters; two experts of 32 units at width 768 have 0.1 M.

Letters: B rows, T tokens a row, D hidden width, E experts, F units of an expert, N tokens.
"""

import copy
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from modeling.blocks import find_blocks

NAME = "mini_moe"  # of the module within its block
WEIGHTS, CONFIG = "experts.safetensors", "experts.json"


class IdleExpert(RuntimeError):
    """An expert or the router gets no gradient: it would be trained in name only."""


@dataclass(frozen=True)
class ExpertsShape:
    """Where a mixture stands, how large it is, and how it is trained.

    after_block: how many blocks come before it, from 1.  units: of an expert's hidden layer.
    balance: weight of the load-balance loss (Switch: 0.01).
    """

    after_block: int
    experts: int
    units: int
    temperature: float
    balance: float

    def __post_init__(self) -> None:
        for name, least in (("after_block", 1), ("experts", 2), ("units", 1)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"'{name}' of a mixture of experts is {getattr(self, name)}; it must be at "
                    f"least {least}"
                )
        if not self.temperature > 0:
            raise ValueError(f"'temperature' is {self.temperature}; it must be above 0")


class TopOneExperts(nn.Module):
    """The branch itself: (..., D) -> (..., D), one expert a token.

    Bare parameters, no nn.Linear: what looks for linear layers to adapt or to pack passes it by.
    """

    def __init__(self, shape: ExpertsShape, width: int) -> None:
        super().__init__()
        self.shape = shape
        self.router = nn.Parameter(torch.randn(shape.experts, width) * width**-0.5)
        self.router_bias = nn.Parameter(torch.zeros(shape.experts))
        self.up = nn.Parameter(torch.randn(shape.experts, shape.units, width) * width**-0.5)
        self.down = nn.Parameter(torch.zeros(shape.experts, width, shape.units))
        self._routed: tuple[Tensor, Tensor] | None = None

    def __deepcopy__(self, memo: dict) -> "TopOneExperts":
        """A copy without the last pass: what autograd holds cannot be copied."""
        twin = memo[id(self)] = TopOneExperts.__new__(TopOneExperts)
        twin.__dict__ = copy.deepcopy(self.__dict__ | {"_routed": None}, memo)
        return twin

    def forward(self, hidden: Tensor) -> Tensor:
        """What is added to (..., D), in its type."""
        x = F.rms_norm(hidden.to(self.up.dtype), hidden.shape[-1:]).flatten(0, -2)  # (N, D)
        probabilities = self.probabilities(x)
        gate, chosen = probabilities.max(-1)
        if torch.is_grad_enabled():
            self._routed = probabilities.unflatten(0, hidden.shape[:-1]), chosen
        out = x.new_zeros(x.shape)
        for expert, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            places = (chosen == expert).nonzero()[:, 0]
            if len(places):
                computed = F.relu(x[places] @ up.T) @ down.T
                out = out.index_copy(0, places, computed * gate[places, None].to(x.dtype))
        return out.view(hidden.shape).to(hidden.dtype)

    def probabilities(self, x: Tensor) -> Tensor:
        """Of each expert for normed states: (N, D) -> (N, E), float32 at least."""
        exact = torch.promote_types(x.dtype, torch.float32)
        logits = x.to(exact) @ self.router.to(exact).T + self.router_bias.to(exact)
        return torch.softmax(logits / self.shape.temperature, -1)

    def load_balance(self, real: Tensor | None = None) -> Tensor:
        """The load-balance loss of the last forward pass with gradients, which is forgotten.

        real: which tokens count, bool of the rows' shape (B, T); None for all. Raises RuntimeError
        when there was no such pass since the last call.
        """
        if self._routed is None:
            raise RuntimeError(
                "load_balance is read once after each forward pass with gradients; there was none"
            )
        (probabilities, chosen), self._routed = self._routed, None
        probabilities = probabilities.flatten(0, -2)
        if real is not None:
            real = real.flatten().to(chosen.device)
            probabilities, chosen = probabilities[real], chosen[real]
        return load_balance_loss(probabilities, chosen)

    def add_to(self, block: nn.Module, given: tuple, output: Any) -> Any:
        """A block's output with the branch added: a tensor, or a tuple that begins with one."""
        del block, given
        if isinstance(output, tuple):
            return output[0] + self(output[0]), *output[1:]
        return output + self(output)


def load_balance_loss(probabilities: Tensor, chosen: Tensor) -> Tensor:
    """E sum_e f_e P_e (Switch, equation 4), of (N, E) and (N,): 1 when even, E at the worst.

    Its gradient comes by P alone; f counts.
    """
    experts = probabilities.shape[-1]
    share = torch.bincount(chosen, minlength=experts).to(probabilities.dtype) / len(chosen)
    return experts * (share * probabilities.mean(0)).sum()


def balance_loss(model: nn.Module, real: Tensor | None = None) -> Tensor | float:
    """What a model's mixture adds to the loss of its last forward pass; 0 without a mixture."""
    experts = find_experts(model)
    return 0.0 if experts is None else experts.shape.balance * experts.load_balance(real)


def add_experts(
    model: PreTrainedModel, shape: ExpertsShape, tokens: Tensor, seed: int
) -> TopOneExperts:
    """Put new experts behind a block of a model, in place; they are trainable, and change nothing.

    tokens: rows of ordinary text (B, T), over which the router starts out even. Put adapters on
    first: PEFT freezes what is there. Raises ValueError for a block that is not there.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        experts = TopOneExperts(shape, model.config.get_text_config().hidden_size)
    _attach(model, experts)
    total, count = torch.zeros_like(experts.router[0], dtype=torch.float32), 0

    def sum_up(_: nn.Module, given: tuple[Tensor]) -> None:
        nonlocal total, count
        x = F.rms_norm(given[0].float(), given[0].shape[-1:]).flatten(0, -2)
        total, count = total + x.sum(0), count + len(x)

    hook = experts.register_forward_pre_hook(sum_up)
    try:
        with torch.no_grad():
            model.get_decoder()(tokens.to(model.device), use_cache=False)
            experts.router_bias.copy_(-(experts.router.float() @ (total / count)))
    finally:
        hook.remove()
    return experts


def _attach(model: PreTrainedModel, experts: TopOneExperts) -> None:
    _, blocks = find_blocks(model)
    place = experts.shape.after_block
    if place > len(blocks):
        raise ValueError(
            f"'after_block' is {place}, but {type(model).__name__} has {len(blocks)} blocks"
        )
    if find_experts(model) is not None:
        raise ValueError(f"{type(model).__name__} has a mixture of experts already")
    block = blocks[place - 1]
    like = next(block.parameters())
    block.add_module(NAME, experts.to(like.device, model.dtype).train(block.training))
    experts.hook = block.register_forward_hook(experts.add_to)


def find_experts(model: nn.Module) -> TopOneExperts | None:
    """The mixture on a model, adapted or not, if it has one."""
    return next((m for m in model.modules() if isinstance(m, TopOneExperts)), None)


def remove_experts(model: PreTrainedModel) -> None:
    """Take a model's mixture off: a stock model again. Without one, nothing happens."""
    for block in find_blocks(model)[1]:
        if isinstance(experts := getattr(block, NAME, None), TopOneExperts):
            experts.hook.remove()
            delattr(block, NAME)


def check_routing(experts: TopOneExperts) -> None:
    """Refuse, after a backward pass with the load-balance loss, what learns nothing.

    Of an expert's two matrices the second one learns first, as it starts at zero. Raises
    IdleExpert, naming them.
    """
    gradients = {f"expert {e}": grad for e, grad in enumerate(_gradient(experts.down))}
    gradients["the router"] = _gradient(experts.router)
    if idle := [name for name, gradient in gradients.items() if not gradient.any()]:
        raise IdleExpert(
            f"no gradient reaches {', '.join(idle)} of the mixture after block "
            f"{experts.shape.after_block}; give a step more tokens, or check that the weight of "
            "the load-balance loss is above 0"
        )


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def save_experts(experts: TopOneExperts, folder: Path) -> None:
    """Write experts.safetensors and experts.json, beside an adapter or alone."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().cpu().contiguous() for name, p in experts.named_parameters()}
    save_file(tensors, folder / WEIGHTS)
    text = json.dumps(asdict(experts.shape), indent=1)
    (folder / CONFIG).write_text(text, encoding="utf-8")


def open_experts(model: PreTrainedModel, folder: Path, trains: bool = False) -> TopOneExperts:
    """Put saved experts on the model they were made for, in place.

    Raises FileNotFoundError for a folder without them, ValueError for a model of another width or
    with too few blocks.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no mixture of experts ({name} is missing)")
    shape = ExpertsShape(**json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    tensors = load_file(folder / WEIGHTS)
    width, own = tensors["router"].shape[1], model.config.get_text_config().hidden_size
    if width != own:
        raise ValueError(
            f"{folder} holds experts for a model of width {width}; {type(model).__name__} has {own}"
        )
    experts = TopOneExperts(shape, width)
    experts.load_state_dict(tensors)
    _attach(model, experts.requires_grad_(trains))
    return experts
