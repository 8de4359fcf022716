"""The student as the stages behind distill find it: its weights, its tokenizer, its history."""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling.backends import be_deterministic, default_device
from modeling.blocks import dissect
from modeling.loading import open_model, open_tokenizer
from stages.formats.importance import read_subspaces
from stages.measuring.forgetting import general_rows, measure_drift


@dataclass(frozen=True)
class Student:
    """A distilled student.

    dropped: the teacher's blocks that it was cut without; None where its states are no teacher's.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    dropped: list[int] | None
    prepared: Path
    profile: Path
    untouched: PreTrainedModel

    def heldout(self, source: str, count: int) -> Tensor:
        """Rows of general text that nothing was trained on, (N, T) int64."""
        return general_rows(self.prepared, source, count)

    def drift(self, model: PreTrainedModel, rows: Tensor) -> dict[int, float]:
        """How far a model made of the student has moved from it; empty for a new network."""
        if self.dropped is None:
            return {}
        return measure_drift(self.untouched, model, self.dropped, self.profile, rows, len(rows))


def open_student(distilled: Path, profiles: Mapping[str, Path], prepared: Path) -> Student:
    """Open what distill has made, twice: to go on from, and to compare with.

    distilled, prepared: folders of these stages; profiles: those of profile, by teacher. Both are
    on the first GPU where there is one.
    """
    facts = json.loads((distilled / "student.json").read_text(encoding="utf-8"))
    device = default_device()
    be_deterministic(device)
    model = open_model(distilled / "student", device)
    profile = profiles[facts["teacher"]]
    return Student(
        model, open_tokenizer(distilled / "student"), _dropped(facts, model, profile), prepared,
        profile, copy.deepcopy(model),
    )  # fmt: skip


def find_adapter(finished: Path, capability: str) -> Path:
    """The folder of a capability's adapter in the output of the stage before.

    Raises ValueError, naming what there is, for a capability that it did not teach.
    """
    there = sorted(path.parent.name for path in finished.glob("*/adapter_config.json"))
    if capability not in there:
        raise ValueError(
            f"stage '{finished.name}' taught no capability '{capability}', but "
            f"{', '.join(there) or 'none'}; set 'capability' to one of these, or add it to "
            "sft.capabilities"
        )
    return finished / capability


def _dropped(facts: dict, model: PreTrainedModel, profile: Path) -> list[int] | None:
    """The blocks that a student of the teacher's width was cut without, else None."""
    blocks, width = read_subspaces(profile).mean.shape
    own = model.get_input_embeddings().weight.shape[1]
    same = (len(dissect(model).blocks), own) == (blocks - len(facts["dropped"]), width)
    return facts["dropped"] if same else None
