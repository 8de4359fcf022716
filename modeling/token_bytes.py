"""The bytes that each token of a tokenizer stands for, and where the tokens of a text lie in it.

Texts are compared as UTF-8 bytes: characters will not do, since a byte-level token may be a part of
one (`offset_mapping` then gives all its parts the same characters). A token's place follows from
the lengths of those before it, which is right if the tokens' bytes, put together, are the text's:
that is checked every time, so a tokenizer that changes its input (lower case, Unicode forms,
dropped spaces) is refused and never misplaced.

    byte-level      GPT-2's alphabet (Radford 2019): one character of a token a byte
    byte fallback   sentencepiece's form: "▁" is a space, <0x0A> a byte
    end of text     one byte, END, that no UTF-8 has: so two tokenizers' ends of text are the same
    start of text   no bytes, unless it is the end's token too
    other special tokens   stand for no text

Not covered: tokenizers without a fast form, WordPiece and byte-less Unigram (both lose bytes).
"""

import codecs
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END = b"\xff"  # what the end of a text stands for
INSIDE = 0.5  # of a byte: where no token of another tokenizer can end
SPACE = "▁"
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class Vocabulary:
    """What tokens stand for, and how bytes that begin at a boundary are split into them.

    tokens: bytes by id; None for a token that stands for no text.
    split: ids of a string of bytes on its own; empty where there are none for it.
    """

    tokens: tuple[bytes | None, ...]
    split: Callable[[bytes], list[int]]

    def join(self, ids: Sequence[int]) -> bytes:
        """The bytes of some tokens. Raises ValueError for one that stands for no text."""
        return b"".join(self._bytes(int(token)) for token in ids)

    def ends(self, ids: Sequence[int]) -> np.ndarray:
        """At which byte each token ends: (T,) int64."""
        return np.cumsum([len(self._bytes(int(token))) for token in ids], dtype=np.int64)

    def _bytes(self, token: int) -> bytes:
        found = self.tokens[token] if token < len(self.tokens) else None
        if found is None:
            raise ValueError(
                f"token {token} stands for no text, so a row with it cannot be aligned with "
                "another tokenizer's; keep special tokens but the end of text out of the rows"
            )
        return found


def vocabulary_of(tokenizer: "PreTrainedTokenizerBase") -> Vocabulary:
    """The bytes of a fast tokenizer's tokens.

    Raises ValueError for one that keeps no bytes; see the module.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"{type(tokenizer).__name__} has no fast form, so it cannot be aligned")
    read = _reader_of(json.loads(backend.to_str()).get("decoder"), type(tokenizer).__name__)
    added = tokenizer.added_tokens_decoder
    tokens: list[bytes | None] = [None] * len(tokenizer)
    for text, token in tokenizer.get_vocab().items():
        if token not in added:
            tokens[token] = read(text)
        elif not added[token].special:
            tokens[token] = text.encode()
    if tokenizer.bos_token_id is not None:
        tokens[tokenizer.bos_token_id] = b""
    end = tokenizer.eos_token_id
    tokens = [None if piece == END else piece for piece in tokens]  # a byte that no text has
    if end is not None:
        tokens[end] = END
    split = (_byte_level_split if read is _from_alphabet else _fallback_split)(tokenizer)
    return Vocabulary(
        tuple(tokens), lambda piece: [end] if piece == END and end is not None else split(piece)
    )


def encode(
    tokenizer: "PreTrainedTokenizerBase", vocabulary: Vocabulary, text: str
) -> tuple[list[int], np.ndarray]:
    """Encode one document: its ids, without special tokens, and the byte at which each ends.

    A space that the tokenizer puts before the text, as sentencepiece does, counts as nothing.
    Raises ValueError where the tokens' bytes are not the text's.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    joined, wanted = vocabulary.join(ids), text.encode()
    ends = vocabulary.ends(ids)
    if joined == b" " + wanted:
        return ids, ends - 1
    if joined != wanted:
        at = len(os.path.commonprefix([joined, wanted]))
        raise ValueError(
            f"{type(tokenizer).__name__} does not keep a text's bytes: {wanted[at : at + 12]!r} "
            f"became {joined[at : at + 12]!r} at byte {at}, so it cannot be aligned with another"
        )
    return ids, ends


def encode_bytes(
    tokenizer: "PreTrainedTokenizerBase", vocabulary: Vocabulary, row: bytes
) -> tuple[list[int], np.ndarray]:
    """Encode documents with END between them, and the byte of the row at which each token ends.

    A character that the row's start or end cuts is left out: the ids begin up to 3 bytes late and
    end as early. Where the tokenizer puts a space before a document, what follows the END before it
    is not the row's next byte: so that END has no place to compare, half a byte early. Raises
    ValueError as `encode`, and UnicodeDecodeError for bytes that are no text.
    """
    late = cut_at_start(row)
    early = next(n for n in range(4) if n == 3 or _is_whole(row[late : len(row) - n]))
    ids: list[int] = []
    ends: list[np.ndarray] = []
    at = late
    for number, document in enumerate(row[late : len(row) - early].split(END)):
        if number:
            ids.append(tokenizer.eos_token_id)
            at += len(END)
            ends.append(np.array([at]))
        members, places = encode(tokenizer, vocabulary, document.decode())
        if number and members and places[0] < len(vocabulary.tokens[members[0]]):
            ends[-1] = np.array([at - INSIDE])
        ids += members
        ends.append(places + at)
        at += len(document)
    return ids, np.concatenate(ends)


def cut_at_start(row: bytes) -> int:
    """How many bytes of a character that a row's start cuts it begins with."""
    return next(n for n in range(4) if n == 3 or not (row[n:] and row[n] & 0xC0 == 0x80))


def _is_whole(piece: bytes) -> bool:
    """Whether a piece does not end inside a character."""
    last = codecs.getincrementaldecoder("utf-8")(errors="replace")
    last.decode(piece)
    return not last.getstate()[0]


def _reader_of(decoder: dict | None, name: str) -> Callable[[str], bytes]:
    """How a tokenizer writes bytes in its vocabulary, told by its decoder."""
    parts = (decoder or {}).get("decoders", [decoder or {}])
    kinds = {part.get("type") for part in parts}
    if "ByteLevel" in kinds:
        return _from_alphabet
    if "ByteFallback" in kinds:
        return _from_fallback
    raise ValueError(
        f"{name} is neither byte-level nor has it a byte fallback (its decoder is "
        f"{', '.join(sorted(map(str, kinds)))}), so it loses bytes and cannot be aligned"
    )


def _alphabet() -> list[str]:
    """GPT-2's character for each byte: itself where it can be printed, else one from 256 on."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(value if value in printed else next(others)) for value in range(256)]


ALPHABET = _alphabet()
VALUES = {character: value for value, character in enumerate(ALPHABET)}


def _from_alphabet(text: str) -> bytes | None:
    """None for a token that is not of the alphabet."""
    if any(character not in VALUES for character in text):
        return None
    return bytes(VALUES[character] for character in text)


def _from_fallback(text: str) -> bytes:
    byte = BYTE_TOKEN.fullmatch(text)
    return bytes([int(byte[1], 16)]) if byte else text.replace(SPACE, " ").encode()


def _byte_level_split(tokenizer: "PreTrainedTokenizerBase") -> Callable[[bytes], list[int]]:
    model = tokenizer.backend_tokenizer.model

    def split(piece: bytes) -> list[int]:
        text = "".join(ALPHABET[value] for value in piece)
        return _known(model.tokenize(text), tokenizer.unk_token_id)

    return split


def _fallback_split(tokenizer: "PreTrainedTokenizerBase") -> Callable[[bytes], list[int]]:
    model, ids = tokenizer.backend_tokenizer.model, tokenizer.get_vocab()

    def split(piece: bytes) -> list[int]:
        try:
            text = piece.decode()
        except UnicodeDecodeError as error:  # a part of a character can only be byte tokens
            if error.start == 0:
                name = f"<0x{piece[0]:02X}>"
                return [ids[name]] if name in ids else []
            text = piece[: error.start].decode()
        return _known(model.tokenize(text.replace(" ", SPACE)), tokenizer.unk_token_id)

    return split


def _known(tokens: list, unknown: int | None) -> list[int]:
    """Ids up to the first token that is not known."""
    ids = [token.id for token in tokens]
    return ids[: ids.index(unknown)] if unknown in ids else ids
