"""Fit a router to pooled states: train, calibrate, choose how deep it reads, add to it later.

A router is trained on the training queries; validation queries fit the temperature and set the
threshold, so that a wanted share of the queries in scope is answered. It reads the states behind
the first one, two, ... of some blocks: the fewest whose validation loss is within a standard error
(paired, by queries) of the least (Breiman 1984), since what reads deeper has more to read again for
an adapter that begins before that.

Letters: N queries, B blocks, D width of states.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from modeling.router import LossWeights, Router, RouterShape, fit_temperature, router_loss

KEEPING = 5.0  # weight of the divergence from what was said before
UNLIKELY = -2.0  # logits of a new capability start so far below the others' mean

Penalty = Callable[[Tensor, Tensor], Tensor]  # of which queries a batch has, and their logits


@dataclass(frozen=True)
class Labelled:
    """Pooled states (N, B, D) and the class of each (N,); the last class is none of them."""

    states: Tensor
    classes: Tensor

    def first(self, blocks: int) -> "Labelled":
        """The same behind the first so many blocks alone."""
        return Labelled(self.states[:, :blocks], self.classes)


@dataclass(frozen=True)
class Course:
    """How a router is trained."""

    steps: int
    batch_queries: int
    learning_rate: float
    weight_decay: float
    weights: LossWeights
    seed: int


def train_router(shape: RouterShape, data: Labelled, course: Course) -> Router:
    """A router trained on labelled states; classes count alike, however many queries they have."""
    with torch.random.fork_rng():
        torch.manual_seed(course.seed)
        router = Router(shape)
    router.standardise(data.states)
    descend(router, data, course)
    return router.eval()


def descend(router: Router, data: Labelled, course: Course, more: Penalty | None = None) -> None:
    """AdamW with a cosine on batches in which every class is drawn as often; more: to the loss."""
    draw = torch.Generator().manual_seed(course.seed)
    counts = torch.bincount(data.classes, minlength=len(router.shape.capabilities) + 1)
    odds = (1 / counts.clamp_min(1).float())[data.classes]
    optimizer = torch.optim.AdamW(
        router.parameters(), lr=course.learning_rate, weight_decay=course.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, course.steps)
    for _ in range(course.steps):
        batch = torch.multinomial(odds, course.batch_queries, replacement=True, generator=draw)
        optimizer.zero_grad()
        logits = router(data.states[batch])
        loss = router_loss(logits, data.classes[batch], course.weights)
        (loss if more is None else loss + more(batch, logits)).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def calibrate(router: Router, validation: Labelled, answered: float) -> Tensor:
    """Fit temperature and threshold to validation queries; the cross-entropy of each behind it.

    answered: the share of the queries in scope that are to be answered, if they are not taken for
    being out of scope in the first place.
    """
    logits = router(validation.states)
    router.temperature.fill_(fit_temperature(logits, validation.classes))
    probabilities = router.probabilities(validation.states)
    inside = validation.classes < len(router.shape.capabilities)
    confidence = probabilities[inside, :-1].amax(-1)
    router.threshold.fill_(torch.quantile(confidence, 1 - answered))
    return cross_entropy(logits / router.temperature, validation.classes, reduction="none")


def best_depth(
    train: Labelled, validation: Labelled, shape: RouterShape, course: Course, answered: float
) -> tuple[Router, dict[int, float]]:
    """The router that reads as few of the shape's blocks as it needs; losses by the last block."""
    routers, losses = [], []
    for depth, _ in enumerate(shape.blocks, start=1):
        shallower = replace(shape, blocks=shape.blocks[:depth])
        routers.append(train_router(shallower, train.first(depth), course))
        losses.append(calibrate(routers[-1], validation.first(depth), answered))
    least = min(losses, key=lambda loss: loss.mean().item())
    chosen = next(r for r, loss in zip(routers, losses, strict=True) if is_as_good(loss, least))
    means = (loss.mean().item() for loss in losses)
    return chosen, dict(zip(shape.blocks, means, strict=True))


def is_as_good(losses: Tensor, least: Tensor) -> bool:
    """Whether losses (N,) are above others of the same queries by a standard error at most."""
    above = losses - least
    return (above.mean() <= above.std() / len(above) ** 0.5).item()


def add_capability(
    router: Router, name: str, new: Tensor, known: Labelled, course: Course
) -> Router:
    """A router that knows one capability more, and says of the others what it said before.

    It goes on from the router's weights, on the new queries' states (N, B, D) and those of queries
    known before (and of none of them), on which the Kullback-Leibler divergence from what it said
    then is added to the loss (Li 2016, learning without forgetting). Temperature and threshold are
    for `calibrate` to fit again.
    """
    old = router.shape
    if name in old.capabilities:
        raise ValueError(
            f"the router knows '{name}' already; it knows {', '.join(old.capabilities)}"
        )
    count = len(old.capabilities)
    grown = widened(router, name)
    said_before = router(known.states).detach().log_softmax(-1)
    states = torch.cat((known.states, new))
    moved = torch.where(known.classes == count, count + 1, known.classes)  # none of them is last
    data = Labelled(states, torch.cat((moved, torch.full((len(new),), count))))
    kept = [*range(count), count + 1]

    def keeping(batch: Tensor, logits: Tensor) -> Tensor:
        here = batch < len(said_before)
        says = logits[here][:, kept].log_softmax(-1)
        apart = kl_div(says, said_before[batch[here]], log_target=True, reduction="sum")
        return KEEPING * apart / len(batch)

    slower = replace(
        course, steps=max(1, course.steps // 2), learning_rate=0.3 * course.learning_rate,
        weight_decay=0.0,
    )  # fmt: skip
    descend(grown, data, slower, keeping)
    return grown.eval()


@torch.no_grad()
def widened(router: Router, name: str) -> Router:
    """The router with a capability more, of which it knows nothing yet."""
    old = router.shape
    grown = Router(replace(old, capabilities=(*old.capabilities, name)))
    same = {k: v for k, v in router.state_dict().items() if not k.startswith("outer")}
    grown.load_state_dict(same, strict=False)
    pairs = zip(grown.outer.parameters(), router.outer.parameters(), strict=True)
    for mine, theirs in pairs:
        mine[:-2], mine[-2], mine[-1] = theirs[:-1], 0.0, theirs[-1]
    grown.outer.bias[-2] = router.outer.bias.mean() + UNLIKELY
    return grown
