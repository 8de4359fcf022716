"""Remove what should not be learnt twice, and what is going to be measured.

Exact duplicates by checksum, of documents and of paragraphs (Wenzek 2020), near duplicates by
MinHash (Broder 1997) over word 5-grams, and decontamination by word 13-grams (Brown 2020, appendix
C): a document that shares one with a benchmark is dropped whole.
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


def clean(
    documents: list[Document], benchmarks: list[Document], near_duplicate: float
) -> tuple[list[Document], dict[str, float]]:
    """Drop duplicates and what overlaps a benchmark; give what is left, and counts by reason."""
    unique = drop_exact_duplicates(documents)
    shorter = drop_repeated_paragraphs(unique)
    distinct = drop_near_duplicates(shorter, near_duplicate)
    kept, contaminated = drop_contaminated(distinct, benchmarks)
    return kept, {
        "documents_read": len(documents),
        "exact_duplicates": len(documents) - len(unique),
        "only_repeated_paragraphs": len(unique) - len(shorter),
        "near_duplicates": len(shorter) - len(distinct),
        **{f"contaminated_{name}": count for name, count in contaminated.items()},
    }


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
    """Keep the first of documents whose word 5-grams overlap: Jaccard index >= similarity."""
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
    owner = {gram: benchmark.source for benchmark in benchmarks for gram in _long(benchmark)}
    kept, counts = [], dict.fromkeys(owner.values(), 0)
    for document in documents:
        hit = next((owner[gram] for gram in _long(document) if gram in owner), None)
        if hit is None:
            kept.append(document)
        else:
            counts[hit] += 1
    return kept, counts


def shared_shares(heldout: list[Document], train: list[Document]) -> dict[str, float]:
    """By source: the share of held-out word 13-grams that also stand in its training documents."""
    shares = {}
    for source in dict.fromkeys(document.source for document in heldout):
        there = {
            gram for document in train if document.source == source for gram in _long(document)
        }
        grams = [
            gram for document in heldout if document.source == source for gram in _long(document)
        ]
        shared = sum(gram in there for gram in grams) / len(grams)
        shares[f"heldout_shared_13grams_{source}"] = round(shared, 5)
    return shares


def _long(document: Document) -> list[str]:
    return _grams(document.words, CONTAMINATION_WORDS)


def _grams(words: list[str], size: int) -> list[str]:
    """All runs of `size` words; a shorter text is one run."""
    return [" ".join(words[i : i + size]) for i in range(max(len(words) - size + 1, 1))]
