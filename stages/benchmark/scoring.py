"""Score models against their teacher, token by token over the full vocabulary.

Every model sees the same rows in the same batches, so differences are paired. Tokens of a row
depend on each other: a row's mean is the unit, and intervals come from resampling rows.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from modeling.blocks import dissect
from modeling.losses import TeacherView
from stages.formats.importance import bootstrap_interval

CHUNK_TOKENS = 512  # positions whose logits are compared at a time
MEASURES = ("kl", "ce", "agree")
TEACHER = "teacher"


@dataclass
class Scores:
    """Row means by "MODEL/TEXT/MEASURE"; grows batch by batch, and can be saved half-way."""

    rows: dict[str, Tensor] = field(default_factory=dict)
    batches: int = 0

    def add(self, key: str, values: Tensor) -> None:
        """Append row means (B,) to what is there."""
        self.rows[key] = torch.cat([self.rows.get(key, values[:0]), values])

    def save(self, folder: Path) -> None:
        """Write scores.safetensors."""
        save_file(
            {**self.rows, "batches": torch.tensor(self.batches)}, folder / "scores.safetensors"
        )

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""
        self.rows = load_file(folder / "scores.safetensors")
        self.batches = int(self.rows.pop("batches"))


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float

    def format(self, digits: int = 3) -> str:
        """Write it as "1.234 [1.200, 1.270]"."""
        return f"{self.value:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


@torch.no_grad()
def score_batch(models: dict[str, PreTrainedModel], tokens: Tensor) -> dict[str, dict[str, Tensor]]:
    """Row means of KL to the teacher, CE and top-1 agreement: model -> measure -> (B,).

    models must have TEACHER first; tokens (B, T) int64.
    """
    anatomies = {name: dissect(model) for name, model in models.items()}
    states = {
        name: final_states(model, tokens)[:, :-1].flatten(0, 1) for name, model in models.items()
    }
    labels = tokens[:, 1:].flatten()
    parts: dict[str, list[tuple[Tensor, ...]]] = {name: [] for name in models}
    for part in torch.arange(len(labels)).split(CHUNK_TOKENS):
        teacher_logits = anatomies[TEACHER].head(states[TEACHER][part])
        teacher = TeacherView.of(teacher_logits)
        for name, anatomy in anatomies.items():
            own = name == TEACHER
            logits = teacher_logits if own else anatomy.head(states[name][part])
            parts[name].append(teacher.scores(logits, labels[part]))
    shape = (tokens.shape[0], tokens.shape[1] - 1)
    return {
        name: {
            measure: torch.cat(column).view(shape).mean(-1)
            for measure, column in zip(MEASURES, zip(*chunks, strict=True), strict=True)
        }
        for name, chunks in parts.items()
    }


def final_states(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """What the head gets, (B, T, D), by the model's own forward."""
    states = model.base_model(tokens, use_cache=False).last_hidden_state
    return states.to(model.get_output_embeddings().weight.dtype)


def estimate(rows: Tensor, resamples: int, seed: int, exponential: bool = False) -> Estimate:
    """The mean of rows with its interval; `exponential` turns nats into a ratio of perplexities."""
    low, high = bootstrap_interval(rows, resamples, seed)
    values = [rows.double().mean().item(), low, high]
    return Estimate(*(torch.tensor(values).exp().tolist() if exponential else values))


def compare(
    scores: Scores, model: str, text: str, resamples: int, seed: int
) -> dict[str, Estimate]:
    """One model on one text: perplexity, its ratio to the teacher's, KL and agreement."""
    own, teacher = scores.rows[f"{model}/{text}/ce"], scores.rows[f"{TEACHER}/{text}/ce"]
    return {
        "perplexity": estimate(own, resamples, seed, exponential=True),
        "perplexity_ratio": estimate(own - teacher, resamples, seed, exponential=True),
        "kl": estimate(scores.rows[f"{model}/{text}/kl"], resamples, seed),
        "agreement": estimate(scores.rows[f"{model}/{text}/agree"], resamples, seed),
    }
