"""Token rows: what `prepare` hands to every later stage.

    tokens/SPLIT/SOURCE.npy    (rows, row_tokens) uint16 or uint32; documents separated by EOS
    documents.jsonl            {"split", "source", "id", "text"} a document, for reading
    tokenizer.json             whose tokenizer made the rows, and how it encodes a probe

SPLIT is train, calibration (choosing blocks, closed-form fits), heldout (measured on, never
trained on) or benchmark (texts of other kinds; never trained on, and removed from the rest).
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE = "def f(x):\n    return 3.14159 * x  # naïve: 2026, 1,000,000 × 7 → “done”\tÜber 你好 🙂"
SPLITS = ("train", "calibration", "heldout", "benchmark")


def write_rows(folder: Path, split: str, source: str, rows: np.ndarray) -> None:
    """Write (rows, row_tokens) token ids, in the smallest type that holds them."""
    path = folder / "tokens" / split / f"{source}.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    narrow = rows.size == 0 or rows.max() < 2**16
    np.save(path, rows.astype(np.uint16 if narrow else np.uint32))


def read_rows(folder: Path, split: str) -> dict[str, np.ndarray]:
    """Give the token rows of a split by source: (rows, row_tokens) int64 each."""
    paths = sorted((folder / "tokens" / split).glob("*.npy"))
    if split not in SPLITS or not paths:
        raise ValueError(f"{folder} has no split '{split}'; splits are {', '.join(SPLITS)}")
    return {path.stem: np.load(path).astype(np.int64) for path in paths}


def read_all_rows(folder: Path, split: str, seed: int) -> np.ndarray:
    """Give the rows of all sources of a split, shuffled by a seed: (rows, row_tokens) int64."""
    rows = np.concatenate(list(read_rows(folder, split).values()))
    return rows[np.random.default_rng(seed).permutation(len(rows))]


def write_tokenizer(folder: Path, name: str, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Note whose tokenizer made the rows, and how it encodes the probe."""
    entry = {"name": name, "probe": encode_probe(tokenizer)}
    (folder / "tokenizer.json").write_text(json.dumps(entry), encoding="utf-8")


def encode_probe(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The probe's ids: two tokenizers that give the same are taken to be one."""
    return tokenizer(PROBE)["input_ids"]


def same_tokenizer(folder: Path, tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the rows' token ids mean to it what they meant to the tokenizer that made them.

    Told by encoding a probe, not by the size of the vocabulary.
    """
    entry = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return encode_probe(tokenizer) == entry["probe"]


def maker_of(folder: Path) -> str:
    """The teacher whose tokenizer made the rows."""
    return json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["name"]


def write_documents(folder: Path, splits: dict[str, list[Any]]) -> None:
    """Write documents.jsonl; each document has a source, an id and a text."""
    with (folder / "documents.jsonl").open("w", encoding="utf-8") as stream:
        for split, documents in splits.items():
            for document in documents:
                entry = {"split": split, **vars(document)}
                stream.write(json.dumps(entry, ensure_ascii=False) + "\n")
