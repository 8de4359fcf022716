"""Bytes of tokens: put together they are the text, and a tokenizer that loses some is refused."""

import numpy as np
import pytest
from tokenizers import decoders, normalizers

from modeling.token_bytes import END, encode, encode_bytes, vocabulary_of
from tests.modeling.vocabularies import CORPUS, trained_bpe

TEXTS = [*CORPUS[:3], "x = '🙃ß你'\t\t# never seen\r\n", " leading, and  double ", "e"]


@pytest.fixture(scope="module", params=[True, False], ids=["byte-level", "byte-fallback"])
def tokenizer(request: pytest.FixtureRequest):
    return trained_bpe(600, request.param)


@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_tokens_put_together_are_the_text(tokenizer, text: str) -> None:
    vocabulary = vocabulary_of(tokenizer)
    ids, ends = encode(tokenizer, vocabulary, text)
    whole, start = vocabulary.join(ids), 0
    shift = len(whole) - len(text.encode())  # the space before the text
    assert whole[shift:] == text.encode() and ends[-1] == len(text.encode())
    for token, end in zip(ids, ends, strict=True):
        assert vocabulary.tokens[token] == (b" " * shift + text.encode())[start : end + shift]
        start = end + shift


def test_ends_agree_with_the_tokenizers_own_offsets_where_these_tell_bytes(tokenizer) -> None:
    text = CORPUS[0]  # ASCII: a character is a byte
    ids, ends = encode(tokenizer, vocabulary_of(tokenizer), text)
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert offsets["input_ids"] == ids
    assert ends.tolist() == [end for _, end in offsets["offset_mapping"]]


def test_parts_of_a_character_have_places_of_their_own() -> None:
    tokenizer = trained_bpe(300)
    _, ends = encode(tokenizer, vocabulary_of(tokenizer), "🙃")
    assert ends[-1] == 4 and (np.diff([0, *ends]) > 0).all() and len(ends) > 1


def test_bytes_are_split_as_the_tokenizer_splits_a_word(tokenizer) -> None:
    vocabulary = vocabulary_of(tokenizer)
    for word in ("teacher", "distribution", "thereafterwards", "größe"):
        ids = vocabulary.split(word.encode())
        assert vocabulary.join(ids) == word.encode()
        assert len(ids) < len(word.encode())


def test_bytes_that_are_no_text_are_split_all_the_same(tokenizer) -> None:
    vocabulary = vocabulary_of(tokenizer)
    piece = "🙃".encode()[1:3]
    assert vocabulary.join(vocabulary.split(piece)[:1]) in (piece, piece[:1])
    half = b"e" + "🙃".encode()[:2]
    assert vocabulary.join(vocabulary.split(half)[:1]) == b"e"


def test_the_ends_of_two_tokenizers_texts_are_the_same() -> None:
    for byte_level in (True, False):
        tokenizer = trained_bpe(600, byte_level)
        assert vocabulary_of(tokenizer).tokens[tokenizer.eos_token_id] == END


def test_a_start_of_text_takes_no_bytes_and_another_special_token_is_refused() -> None:
    tokenizer = trained_bpe(400, bos_token="<s>", pad_token="<pad>")
    vocabulary = vocabulary_of(tokenizer)
    assert vocabulary.ends([tokenizer.bos_token_id, *vocabulary.split(b"the")])[0] == 0
    with pytest.raises(ValueError, match="stands for no text"):
        vocabulary.join([tokenizer.pad_token_id])
    with pytest.raises(ValueError, match="stands for no text"):
        vocabulary.join([len(tokenizer) + 5])


def test_a_tokenizer_that_changes_its_text_is_refused() -> None:
    tokenizer = trained_bpe(400)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ValueError, match=r"b'T.*became b't.*at byte 4"):
        encode(tokenizer, vocabulary_of(tokenizer), "the The")


def test_a_tokenizer_that_keeps_no_bytes_is_refused() -> None:
    tokenizer = trained_bpe(400)
    tokenizer.backend_tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(ValueError, match="loses bytes"):
        vocabulary_of(tokenizer)


# --- rows: documents with an end of text between them, cut anywhere ----------------------------


def test_a_row_of_documents_is_encoded_one_by_one_with_ends_between(tokenizer) -> None:
    vocabulary = vocabulary_of(tokenizer)
    row = b"of it." + END + "naïve 🙂".encode() + END + END + b"the"
    ids, ends = encode_bytes(tokenizer, vocabulary, row)
    assert ends[-1] == len(row) and (np.diff(ends) >= 0).all()
    places = [end for token, end in zip(ids, ends, strict=True) if token == tokenizer.eos_token_id]
    assert np.ceil(places).tolist() == [n + 1 for n, value in enumerate(row) if value == END[0]]
    whole = tokenizer("naïve 🙂", add_special_tokens=False)["input_ids"]
    first = ids.index(tokenizer.eos_token_id) + 1
    assert ids[first : first + len(whole)] == whole


@pytest.mark.parametrize("start", range(5))
@pytest.mark.parametrize("stop", range(5))
def test_a_character_that_a_rows_edge_cuts_is_left_out(tokenizer, start: int, stop: int) -> None:
    smile = "🙂".encode()
    row = smile[start:] + b"the theory" + smile[:stop]
    ids, ends = encode_bytes(tokenizer, vocabulary_of(tokenizer), row)
    kept = row[int(start in (1, 2, 3)) * (4 - start) : len(row) - (stop if stop < 4 else 0)]
    late = row.index(kept)
    assert ends[-1] == late + len(kept) and late <= ends[0]
    assert vocabulary_of(tokenizer).join(ids).strip() == kept


def test_bytes_that_are_no_text_are_refused(tokenizer) -> None:
    with pytest.raises(UnicodeDecodeError):
        encode_bytes(tokenizer, vocabulary_of(tokenizer), b"the \xc3( theory")
