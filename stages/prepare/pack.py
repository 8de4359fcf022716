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


def split_documents(
    documents: list[Document], heldout_share: float, calibration_share: float, seed: int
) -> dict[str, list[Document]]:
    """Put each document into train, calibration or heldout, whole."""
    splits: dict[str, list[Document]] = {"train": [], "calibration": [], "heldout": []}
    for document in documents:
        splits[split_of(document, heldout_share, calibration_share, seed)].append(document)
    return splits


def pack_split(
    documents: list[Document], tokenizer: PreTrainedTokenizerBase, row_tokens: int, seed: int
) -> dict[str, np.ndarray]:
    """Rows by source, in order of appearance; a source too short for one row is left out."""
    sources = dict.fromkeys(document.source for document in documents)
    packed = {
        source: pack_rows([d for d in documents if d.source == source], tokenizer, row_tokens, seed)
        for source in sources
    }
    return {source: rows for source, rows in packed.items() if len(rows)}


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
