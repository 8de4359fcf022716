"""Remove what should not be learnt twice, and what is going to be measured.

Exact duplicates by checksum, of documents and of paragraphs (Wenzek 2020), near duplicates by MinHash (Broder 1997) over word 5-grams, and
decontamination by word 13-grams (Brown 2020, appendix C): a document that shares one with a
benchmark is dropped whole.
"""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

SHINGLE_WORDS = 5
CONTAMINATION_WORDS = 13
PERMUTATIONS = 64  # of MinHash: standard error of a similarity about 1/8

WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Document:
    """A text, where it is from, and which registry entry gave it."""

    source: str
    id: str
    text: str

    @property
    def words(self) -> list[str]:
        """Its words in lower case, without punctuation: what comparisons look at."""
        return WORD.findall(self.text.lower())


def drop_exact_duplicates(documents: list[Document]) -> list[Document]:
    """Keep the first of documents with the same words."""
    first: dict[bytes, Document] = {}
    for document in documents:
        key = hashlib.sha256(" ".join(document.words).encode()).digest()
        first.setdefault(key, document)
    return list(first.values())


def drop_repeated_paragraphs(documents: list[Document]) -> list[Document]:
    """Keep each paragraph of at least 13 words once, where it stands first."""
    seen: set[str] = set()
    kept = []
    for document in documents:
        paragraphs = []
        for paragraph in document.text.split("\n\n"):
            words = WORD.findall(paragraph.lower())
            key = " ".join(words)
            if len(words) < CONTAMINATION_WORDS or key not in seen:
                paragraphs.append(paragraph)
            seen.add(key)
        if any(paragraph.strip() for paragraph in paragraphs):
            kept.append(replace(document, text="\n\n".join(paragraphs)))
    return kept


def drop_near_duplicates(documents: list[Document], similarity: float) -> list[Document]:
    """Keep the first of documents whose word 5-grams have an estimated Jaccard index >= similarity."""
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=similarity, num_perm=PERMUTATIONS)
    kept = []
    for number, document in enumerate(documents):
        sketch = MinHash(num_perm=PERMUTATIONS)
        sketch.update_batch([gram.encode() for gram in _grams(document.words, SHINGLE_WORDS)])
        if not index.query(sketch):
            index.insert(number, sketch)
            kept.append(document)
    return kept


def drop_contaminated(
    documents: list[Document], benchmarks: Iterable[Document]
) -> tuple[list[Document], dict[str, int]]:
    """Drop documents that share 13 words in a row with a benchmark; count them by benchmark."""
    owner = {
        gram: benchmark.source
        for benchmark in benchmarks
        for gram in _grams(benchmark.words, CONTAMINATION_WORDS)
    }
    kept, counts = [], dict.fromkeys(owner.values(), 0)
    for document in documents:
        hit = next(
            (owner[g] for g in _grams(document.words, CONTAMINATION_WORDS) if g in owner), None
        )
        if hit is None:
            kept.append(document)
        else:
            counts[hit] += 1
    return kept, counts


def shared_share(documents: list[Document], others: list[Document]) -> float:
    """The share of word 13-grams of `documents` that also stand in `others`."""
    there = {gram for document in others for gram in _grams(document.words, CONTAMINATION_WORDS)}
    grams = [gram for document in documents for gram in _grams(document.words, CONTAMINATION_WORDS)]
    return sum(gram in there for gram in grams) / max(len(grams), 1)


def _grams(words: list[str], size: int) -> list[str]:
    """All runs of `size` words; a shorter text is one run."""
    return [" ".join(words[i : i + size]) for i in range(max(len(words) - size + 1, 1))]
