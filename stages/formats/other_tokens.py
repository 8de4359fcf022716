"""Rows for a teacher whose tokenizer is not the one that made them: the same bytes in its tokens.

What such a teacher says is put into the rows' own tokens where it is extracted
(modeling/translation.py), so that every later stage has targets of one kind.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from modeling.loading import locate, open_tokenizer
from modeling.token_bytes import Vocabulary, encode_bytes, vocabulary_of
from stages.formats.tokens import maker_of, same_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Tongues:
    """The rows' tokens, and another tokenizer and its tokens."""

    rows: Vocabulary
    tokenizer: "PreTrainedTokenizerBase"
    other: Vocabulary


def open_tongues(folder: Path, name: str, tokenizer: "PreTrainedTokenizerBase") -> Tongues:
    """What each token of the rows stands for, and of a teacher `name`.

    Raises ValueError, naming the tokenizer, where one does not tell its tokens' bytes or has no end
    of text, or where what made the rows is no longer the same.
    """
    maker = maker_of(folder)
    own = open_tokenizer(locate(maker))
    if not same_tokenizer(folder, own):
        raise ValueError(
            f"the tokenizer of '{maker}' is not the one that made the rows any more; make them "
            "again: ./run_pipeline.sh --from prepare"
        )
    found = []
    for owner, one in ((maker, own), (name, tokenizer)):
        try:
            found.append(vocabulary_of(one))
        except ValueError as error:
            raise ValueError(
                f"teacher '{name}' has another tokenizer than '{maker}', which made the rows, and "
                f"that of '{owner}' cannot be translated: {error}"
            ) from error
        if one.eos_token_id is None:
            raise ValueError(
                f"the tokenizer of '{owner}' has no end of text, so '{name}' cannot be asked about "
                f"rows of '{maker}'; choose teachers of one tokenizer"
            )
    return Tongues(found[0], tokenizer, found[1])


def reread_rows(rows: np.ndarray, tongues: Tongues) -> np.ndarray:
    """The texts of rows (R, T) in the other's tokens, joined by its end of text: (R', T) int64.

    Cut into rows again, so none has to be filled up; the rest that fills none is left out.
    """
    ids: list[int] = []
    for row in rows:
        ids += encode_bytes(tongues.tokenizer, tongues.other, tongues.rows.join(row))[0]
        ids.append(tongues.tokenizer.eos_token_id)
    width = rows.shape[1]
    found = np.array(ids[: len(ids) // width * width], dtype=np.int64).reshape(-1, width)
    if not len(found):
        raise ValueError(
            f"{len(rows)} rows of {width} tokens give only {len(ids)} tokens of the teacher's, not "
            "one row; raise prepare.calibration_rows"
        )
    return found
