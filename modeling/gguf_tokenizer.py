"""A byte-level BPE tokenizer as llama.cpp keeps one: tokens, merges, and the name of a splitter.

Both ways: `write_tokenizer`, and `restore_splitter` for files of others. llama.cpp has the regular
expressions that split a text before BPE compiled in, under names. The name is found from what the
tokenizer itself does, not from which model it came with: a tokenizer that splits in a way that
llama.cpp has no name for is refused, since it would get other tokens. transformers reads tokens and
merges from a file, but not the splitter's name (of SmolLM2's tokens of Python's documentation, 1 in
700 is another then).
"""

import json
import warnings
from typing import Any

from gguf import GGUFWriter, TokenType
from tokenizers import Regex, pre_tokenizers
from transformers import PreTrainedTokenizerBase

_WORDS = (
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{DIGITS}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLIT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)" + _WORDS
SPLITTERS = {  # what is done one after the other -> llama.cpp's name, and whether it ignores merges
    ("gpt2 words",): ("gpt-2", False),
    ("single digits", "gpt2 words"): ("smollm", False),
    (_SPLIT.replace("{DIGITS}", "{1,3}"), "bytes"): ("llama-bpe", True),
    (_SPLIT.replace("{DIGITS}", ""), "bytes"): ("qwen2", False),
}


def write_tokenizer(
    writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, vocabulary: int
) -> None:
    """Write a tokenizer whose model has `vocabulary` rows; rows without a token are named unused.

    Raises ValueError, naming what llama.cpp would do otherwise.
    """
    state = _state(tokenizer)
    splitter = _splitter(state)
    tokens, types = _tokens(tokenizer, vocabulary)
    begins, ends = _wrapping(tokenizer)
    writer.add_tokenizer_model("gpt2")  # llama.cpp's word for byte-level BPE
    writer.add_tokenizer_pre(splitter)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = [
        pair if isinstance(pair, str) else " ".join(pair) for pair in state["model"]["merges"]
    ]
    if merges:
        writer.add_token_merges(merges)
    for name in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(begins)
    writer.add_add_eos_token(ends)
    writer.add_add_space_prefix(False)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def restore_splitter(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Make a tokenizer read from a GGUF file split as the file's `tokenizer.ggml.pre` says.

    A name that is not among SPLITTERS leaves it as transformers reads it, and a warning says so.
    """
    steps = next((steps for steps, (known, _) in SPLITTERS.items() if known == name), None)
    if steps is None:
        warnings.warn(
            f"the file's tokenizer splits as '{name}', which is not known here; it is read as "
            "transformers reads it, so some text may get other tokens than in llama.cpp",
            stacklevel=2,
        )
        return
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(map(_build, steps)))


def _build(step: str) -> pre_tokenizers.PreTokenizer:
    """The step of splitting that `_step` has this word for."""
    match step:
        case "gpt2 words" | "bytes":
            return pre_tokenizers.ByteLevel(False, use_regex=step == "gpt2 words")
        case "single digits":
            return pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Split(Regex(step), "isolated")


def _state(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What the fast tokenizer is made of, as tokenizer.json has it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"a {type(tokenizer).__name__} has no fast tokenizer (tokenizer.json)")
    state = json.loads(backend.to_str())
    model, normalizer = state["model"], state["normalizer"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        kind = "BPE with a byte fallback" if model["type"] == "BPE" else model["type"]
        raise ValueError(f"its tokenizer is {kind}; only byte-level BPE can be written here")
    if normalizer is not None and normalizer["type"] != "NFC":  # text is NFC as a rule
        raise ValueError(f"its tokenizer normalises ({normalizer['type']}); llama.cpp would not")
    for token in state["added_tokens"]:
        if strips := [way for way in ("lstrip", "rstrip", "single_word") if token[way]]:
            raise ValueError(
                f"its token '{token['content']}' has {strips[0]}; llama.cpp has no such"
            )
    return state


def _splitter(state: dict[str, Any]) -> str:
    """llama.cpp's name of the way in which a tokenizer splits a text before BPE."""
    split = state["pre_tokenizer"] or {"type": "nothing"}
    steps = split["pretokenizers"] if split["type"] == "Sequence" else [split]
    done = tuple(map(_step, steps))
    name, ignores_merges = SPLITTERS.get(done, (None, None))
    if name is None:
        raise ValueError(
            f"its tokenizer splits by {', then '.join(done)}, which llama.cpp has no name for that "
            f"is known here; known: {', '.join(name for name, _ in SPLITTERS.values())}"
        )
    if bool(state["model"].get("ignore_merges")) != ignores_merges:
        raise ValueError(
            f"its tokenizer splits as '{name}', for which llama.cpp has ignore_merges "
            f"{ignores_merges}, and its own is {not ignores_merges}"
        )
    return name


def _step(step: dict[str, Any]) -> str:
    """One step of splitting, in a word."""
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}:
            return "gpt2 words" if use_regex else "bytes"
        case {"type": "Digits", "individual_digits": True}:
            return "single digits"
        case {
            "type": "Split",
            "pattern": {"Regex": regex},
            "behavior": "Isolated",
            "invert": False,
        }:
            return regex
    return json.dumps(step)


def _tokens(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> tuple[list[str], list[int]]:
    """Every row's token and its type."""
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    if (highest := max(by_id)) >= vocabulary:
        raise ValueError(
            f"its tokenizer has a token {highest}, its model only {vocabulary}; they do not belong "
            "together"
        )
    tokens = [by_id.get(number, f"[PAD{number}]") for number in range(vocabulary)]
    types = [TokenType.NORMAL if n in by_id else TokenType.UNUSED for n in range(vocabulary)]
    for number, token in tokenizer.added_tokens_decoder.items():
        types[number] = TokenType.CONTROL if token.special else TokenType.USER_DEFINED
    return tokens, types


def _wrapping(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether a text gets a token before it, and one behind it."""
    inner, whole = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    for begins in (False, True):
        for ends in (False, True):
            before = [tokenizer.bos_token_id] * begins
            if whole == before + inner + [tokenizer.eos_token_id] * ends:
                return begins, ends
    raise ValueError(
        f"its tokenizer makes {whole} of 'a', which is {inner}; llama.cpp can add one token of "
        "begin and one of end alone"
    )
