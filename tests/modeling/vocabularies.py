"""Tokenizers of a few tokens whose every text can be written down, and trained ones."""

import itertools

import numpy as np

from modeling.token_bytes import Vocabulary

LETTERS = "abc"


def longest_match(*pieces: str) -> Vocabulary:
    """A tokenizer that takes the longest token that there is, again and again."""
    tokens = tuple(piece.encode() for piece in pieces)

    def split(text: bytes) -> list[int]:
        ids = []
        while text:
            fitting = [n for n, token in enumerate(tokens) if text.startswith(token)]
            if not fitting:
                return ids
            ids.append(max(fitting, key=lambda n: len(tokens[n])))
            text = text[len(tokens[ids[-1]]) :]
        return ids

    return Vocabulary(tokens, split)


def random_vocabulary(generator: np.random.Generator, extra: int) -> Vocabulary:
    """All letters, and some pieces of two and three of them, in any order."""
    longer = ["".join(p) for n in (2, 3) for p in itertools.product(LETTERS, repeat=n)]
    chosen = generator.choice(longer, extra, replace=False).tolist()
    pieces = [*LETTERS, *chosen]
    generator.shuffle(pieces)
    return longest_match(*pieces)


def all_texts(length: int) -> list[bytes]:
    return ["".join(letters).encode() for letters in itertools.product(LETTERS, repeat=length)]


CORPUS = [
    "the theory of the thing is that other things are there, then and thereafter.\n",
    "def distil(teacher, student):\n    return teacher.distribution - student.distribution\n",
    "naïve café, Übergröße, 你好, 🙂 and 1,000,000 × 7\n",
] * 40


def trained_bpe(size: int, byte_level: bool = True, texts: list[str] | None = None, **special):
    """A fast BPE tokenizer of transformers, byte-level or with a byte fallback as sentencepiece."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    end = "<end>"
    if byte_level:
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        known = {"special_tokens": [end], "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    else:
        made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        made.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        made.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        fallback = [f"<0x{value:02X}>" for value in range(256)]
        known = {"special_tokens": ["<unk>", end, *fallback], "limit_alphabet": 60}
        special = {"unk_token": "<unk>", **special}
    texts = CORPUS if texts is None else texts
    made.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, **known))
    if not byte_level:
        made = _bytes_are_not_special(made)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=end, **special)


def _bytes_are_not_special(made):
    """Byte tokens belong to the vocabulary alone; the trainer made them special, too."""
    import json

    from tokenizers import Tokenizer

    state = json.loads(made.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if not t["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(state))
