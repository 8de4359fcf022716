"""What a model is shown of a request: one way, for training and for use.

The parts of a dialogue are tokenised apart, prompt, own text and results, because that is how they
come into being: what the model writes is sampled token by token, what a tool answers is put in as a
whole. A tokenizer that merged characters over such a border would show in training what never
happens in use.
"""

from transformers import PreTrainedTokenizerBase

SYSTEM = "You can call tools: <<calc>>, <<py>> and <<bash>>."
PLAIN = "Question: {request}\nAnswer:"  # for models that were never taught a dialogue


def prompt_tokens(request: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens behind which the model answers: its chat template, or PLAIN where it has none."""
    if tokenizer.chat_template is None:
        return tokenizer(PLAIN.format(request=request))["input_ids"]
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": request}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def request_span(tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Which tokens of `prompt_tokens` are the request's: the first, and behind the last."""
    before, behind = request_edges(tokenizer)
    return before, len(tokens) - behind


def request_edges(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """How many tokens `prompt_tokens` puts in front of every request, and how many behind it."""
    one, other = prompt_tokens("a", tokenizer), prompt_tokens("Z", tokenizer)
    return _in_common(one, other), _in_common(one[::-1], other[::-1])


def _in_common(one: list[int], other: list[int]) -> int:
    """How many tokens two rows begin with alike."""
    differ = (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differ, min(len(one), len(other)))


def inserted_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a text that is put into an answer, as a tool's result."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]
