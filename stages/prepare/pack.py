"""Split by document, tokenise, and pack into rows of equal length."""

import hashlib

import numpy as np
from transformers import PreTrainedTokenizerBase

from stages.prepare.clean import Document


def split_of(document: Document, heldout_share: float, calibration_share: float, seed: int) -> str:
    """Choose a split by a hash of the document's id: the same whatever else is in the data."""
    digest = hashlib.sha256(f"{seed}/{document.source}/{document.id}".encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    if position < heldout_share:
        return "heldout"
    return "calibration" if position < heldout_share + calibration_share else "train"


def pack_rows(
    documents: list[Document], tokenizer: PreTrainedTokenizerBase, row_tokens: int, seed: int
) -> np.ndarray:
    """Join documents with EOS between them and cut into rows, shuffled: (rows, row_tokens) int64.

    Shuffled, so that the first n rows are a sample of all documents. The rest that does not fill a
    row is left out.
    """
    ids: list[int] = []
    for encoded in tokenizer([document.text for document in documents])["input_ids"]:
        ids += [*encoded, tokenizer.eos_token_id]
    rows = np.array(ids[: len(ids) // row_tokens * row_tokens], dtype=np.int64)
    rows = rows.reshape(-1, row_tokens)
    return rows[np.random.default_rng(seed).permutation(len(rows))]
