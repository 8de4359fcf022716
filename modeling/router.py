"""The adapter router: which skills a query wants, read off the student's own state of it.

    logits = W2 gelu(W1 (s - shift) / scale + b1) + b2    of capabilities; the last, of none of them

s are the query's pooled states behind some blocks (runtime/adapters/routing.py has them on the way
through a prompt that has to be read anyway). The last class is what lies out of scope: the core
model answers that by itself. Nexus calls this a sparse intent router; its published one learnt
which teacher had padded the vector with zeros.

The loss, of logits z and p = softmax z over a batch, is

    CE + w_z mean (logsumexp z)^2 - beta H(mean p) + lambda mean H(p)

z-loss (Zoph 2022) keeps logits small; the two entropies are the mutual information of query and
skill (Bridle 1991, Krause 2010): diverse over a batch, confident for a query.

Probabilities are calibrated by one temperature (Guo 2017), fitted on queries that nothing was
trained on, and so is the probability below which the router abstains.

Letters: N queries, B blocks, D width of states, C capabilities.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import exp
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

WEIGHTS, CONFIG = "router.safetensors", "router.json"


class BadRouter(ValueError):
    """A folder that holds no router, or one of another student."""


@dataclass(frozen=True)
class RouterShape:
    """What a router chooses between, and from what.

    capabilities: names of adapters.  blocks: whose outputs it reads, from 1, ascending.  width: D.
    """

    capabilities: tuple[str, ...]
    blocks: tuple[int, ...]
    width: int
    hidden: int


@dataclass(frozen=True)
class Decision:
    """What a router makes of a query.

    weights: of the adapters to use, sums to 1; empty where it abstains and the core model answers.
    confidence: the calibrated probability of the likeliest capability.
    """

    weights: dict[str, float]
    confidence: float

    @property
    def abstains(self) -> bool:
        """Whether the query is taken to be out of scope."""
        return not self.weights


class Router(nn.Module):
    """Logits of capabilities, and of none of them, from pooled states."""

    shift: Tensor
    scale: Tensor
    temperature: Tensor
    threshold: Tensor

    def __init__(self, shape: RouterShape) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("shift", torch.zeros(len(shape.blocks), shape.width))
        self.register_buffer("scale", torch.ones(len(shape.blocks), shape.width))
        self.register_buffer("temperature", torch.ones(()))
        self.register_buffer("threshold", torch.zeros(()))
        self.inner = nn.Linear(len(shape.blocks) * shape.width, shape.hidden)
        self.outer = nn.Linear(shape.hidden, len(shape.capabilities) + 1)

    def forward(self, states: Tensor) -> Tensor:
        """Logits (N, C + 1) of pooled states (N, B, D)."""
        standard = (states.to(self.scale.dtype) - self.shift) / self.scale
        return self.outer(nn.functional.gelu(self.inner(standard.flatten(1))))

    def standardise(self, states: Tensor) -> None:
        """Take shift and scale from states (N, B, D) to learn from."""
        self.shift.copy_(states.mean(0))
        self.scale.copy_(states.std(0).clamp_min(1e-6))

    @torch.no_grad()
    def probabilities(self, states: Tensor) -> Tensor:
        """Calibrated probabilities (N, C + 1); the last is that of none of the capabilities."""
        return (self(states) / self.temperature).softmax(-1)

    def choose(self, states: Tensor, most: int = 1) -> list[Decision]:
        """The likeliest `most` capabilities of each query, weighted by their probabilities.

        Abstains where none of them is the likeliest class, or that one is below the threshold.
        """
        if not 1 <= most <= len(self.shape.capabilities):
            raise ValueError(
                f"{most} adapters a query of {len(self.shape.capabilities)} there are; choose from "
                "1 to all of them"
            )
        probabilities, threshold = self.probabilities(states), self.threshold.item()
        best = probabilities[:, :-1].topk(most)
        rows = zip(
            best.values.tolist(), best.indices.tolist(), probabilities[:, -1].tolist(), strict=True
        )
        decisions = []
        for values, places, none in rows:
            weights: dict[str, float] = {}
            if values[0] > none and values[0] >= threshold:
                names = (self.shape.capabilities[place] for place in places)
                weights = {n: v / sum(values) for n, v in zip(names, values, strict=True)}
            decisions.append(Decision(weights, values[0]))
        return decisions


@dataclass(frozen=True)
class LossWeights:
    """What stands beside the cross-entropy: z-loss, diversity (beta), confidence (lambda)."""

    z: float
    diversity: float
    confidence: float


def router_loss(logits: Tensor, labels: Tensor, weights: LossWeights) -> Tensor:
    """The loss of logits (N, C + 1) and classes (N,); see the module."""
    loss = cross_entropy(logits, labels)
    log_p = logits.log_softmax(-1)
    z_loss = logits.logsumexp(-1).square().mean()
    diversity = entropy(log_p.exp().mean(0, keepdim=True).clamp_min(1e-12).log())
    confidence = entropy(log_p)
    return (
        loss + weights.z * z_loss - weights.diversity * diversity + weights.confidence * confidence
    )


def entropy(log_p: Tensor) -> Tensor:
    """The mean entropy in nats of distributions given by their log-probabilities (N, C)."""
    return -(log_p.exp() * log_p).sum(-1).mean()


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature of least cross-entropy, within 1/20 to 20 (golden section in its log)."""
    low, high = -3.0, 3.0
    golden = (5**0.5 - 1) / 2

    def loss(log_temperature: float) -> float:
        return cross_entropy(logits / exp(log_temperature), labels).item()

    for _ in range(60):
        one, other = high - golden * (high - low), low + golden * (high - low)
        if loss(one) <= loss(other):
            high = other
        else:
            low = one
    return exp((low + high) / 2)


def expected_calibration_error(
    confidence: Sequence[float], right: Sequence[bool], bins: int = 15
) -> float:
    """Mean distance of confidence and share of right answers, by bins of equal width (Guo 2017)."""
    groups: dict[int, list[tuple[float, bool]]] = {}
    for value, hit in zip(confidence, right, strict=True):
        groups.setdefault(min(bins - 1, int(value * bins)), []).append((value, hit))
    apart = (abs(sum(v for v, _ in group) - sum(h for _, h in group)) for group in groups.values())
    return sum(apart) / max(1, len(confidence))


def save_router(router: Router, folder: Path) -> None:
    """Write router.safetensors and router.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().contiguous() for name, t in router.state_dict().items()}
    save_file(tensors, folder / WEIGHTS)
    fields = json.dumps(asdict(router.shape), indent=1, sort_keys=True)
    (folder / CONFIG).write_text(fields + "\n", encoding="utf-8")


def open_router(folder: Path, width: int) -> Router:
    """Read what `save_router` wrote; width: of the student's states.

    Raises BadRouter for a folder without a router, or one for states of another width.
    """
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise BadRouter(f"{folder} holds no router ({CONFIG} and {WEIGHTS}); run stage route")
    fields = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    shape = RouterShape(
        **{**fields, **{name: tuple(fields[name]) for name in ("capabilities", "blocks")}}
    )
    if shape.width != width:
        raise BadRouter(
            f"the router in {folder} reads states of width {shape.width}; the student's are "
            f"{width}: train it on this student (stage route)"
        )
    router = Router(shape)
    router.load_state_dict(load_file(folder / WEIGHTS))
    return router.eval()
