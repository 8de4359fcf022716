"""A teacher with another tokenizer: its answers, in the tokens of the rows."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from modeling.answers import Answers, head_not_finite, logits_of
from modeling.losses import SparseTargets
from modeling.streaming import Passage
from modeling.translated_rows import TranslatedRow, observe, translate_row
from modeling.translation import Translation
from stages.formats.other_tokens import Tongues
from stages.formats.targets import narrow

LEAST = 1e-30  # mass of a token that is not possible: its logarithm is finite


@dataclass(frozen=True)
class Translated:
    """All rows, in the teacher's tokens.

    rows: (R, T), the student's.  read: of each row, the teacher's.  given: (R, U), what the teacher
    is given: filled up on the right, which a causal model does not see.
    """

    rows: Tensor
    read: list[TranslatedRow]
    given: Tensor
    translation: Translation
    top_k: int

    @classmethod
    def of(cls, rows: np.ndarray, tongues: Tongues, top_k: int) -> "Translated":
        """Of rows (R, T). Raises ValueError where a row cannot be read by both."""
        read = [translate_row(row, tongues.rows, tongues.tokenizer, tongues.other) for row in rows]
        width = max(len(row.tokens) for row in read)
        given = torch.full((len(read), width), tongues.tokenizer.eos_token_id)
        for place, row in zip(given, read, strict=True):
            place[: len(row.tokens)] = torch.from_numpy(row.tokens)
        translation = Translation(tongues.other, tongues.rows, observe(rows, read))
        return cls(torch.from_numpy(rows), read, given, translation, top_k)

    @torch.no_grad()
    def answers(self, passage: Passage, first: int) -> Iterator[dict[str, Tensor]]:
        """What is stored of each batch, when a passage has run up to the head.

        first: the number of its first row. Raises NotFinite.
        """
        logits = logits_of(passage)
        for forward in passage.forwards:
            count = len(forward.inputs["input_ids"])
            parts = []
            for place, number in enumerate(range(first, first + count)):
                offset = place * self.given.shape[1]
                used = torch.arange(len(self.read[number].tokens)) + offset
                found = logits(forward, used).float()
                if not torch.isfinite(found).all():
                    raise head_not_finite(passage)
                parts.append(self.answers_on_row(number, found.softmax(-1).cpu()))
            first += count
            yield {name: torch.stack([part[name] for part in parts]) for name in parts[0]}

    def answers_on_row(self, number: int, p: Tensor) -> dict[str, Tensor]:
        """What is stored of a row, of the teacher's probabilities (U, V).

        A position without an answer gets the token that follows in the text, and is told of.
        """
        row, places = self.rows[number], self.read[number].places
        answered = torch.tensor([place is not None for place in places])
        masses = p.new_zeros(len(row), len(self.translation.student.tokens))  # (T, S)
        there = [place for place in places if place is not None]
        at = torch.tensor([place.at for place in there])
        masses[answered] = self.translation.masses(p[at], [place.before for place in there])
        from_text = masses.sum(-1) == 0
        masses[from_text, row.roll(-1)[from_text]] = 1.0
        return {
            **self._stored(Answers.of(masses.clamp_min(LEAST).log(), self.top_k).targets()),
            "tokens": narrow(row, masses.shape[1]),
            "from_text": from_text.to(torch.uint8),
        }

    def _stored(self, targets: SparseTargets) -> dict[str, Tensor]:
        return {
            "ids": narrow(targets.ids, len(self.translation.student.tokens)),
            "log_probs": targets.log_probs.half(),
            "tail": targets.tail.log().half(),
        }
