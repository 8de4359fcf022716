"""What tests of the engine share: a tokenizer of characters, a calculator, and a tiny model that
has learnt by heart to ask the calculator."""

import re
from functools import cache

import torch
from torch.nn.functional import cross_entropy

from runtime.tools.calls import BadCall, Call, ToolResult
from tests.tiny import tiny_llama

END = 96
PROMPT = "What is 12*34?\n"
CALL = '<<calc>>{"expression": "12*34"}'
RESULT = "<<result>>408\n"
FINAL = "FINAL: 408"


@cache
def letters():
    """A tokenizer of one token a printable ASCII character, and one that ends a text."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = ["\n", *map(chr, range(32, 127))]
    vocabulary = {character: number for number, character in enumerate(characters)} | {"<end>": END}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")


def encode(text: str) -> list[int]:
    return letters().encode(text, add_special_tokens=False)


class Calculator:
    """Multiplies; a stand-in for runtime/tools, which says how often and with what it was asked."""

    def __init__(self, answer: str | int | None = None) -> None:
        self.asked: list[list[str]] = []
        self._answer = answer

    def run_all(self, calls: list[Call | BadCall]) -> list[ToolResult]:
        self.asked.append([call.text for call in calls])
        products = [re.findall(r"\d+", call.text) for call in calls]
        values = [self._answer or int(a) * int(b) for a, b in products]
        return [ToolResult(True, value, None, 0.0) for value in values]


@cache
def asker(text: str = PROMPT + CALL + RESULT + FINAL):
    """A tiny Llama that goes on with a text as it was taught, and ends behind it."""
    model = tiny_llama(blocks=2).requires_grad_(True).train()
    model.generation_config.eos_token_id = END
    tokens = torch.tensor([[*encode(text), END]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(300):
        logits = model(tokens[:, :-1]).logits[0]
        loss = cross_entropy(logits, tokens[0, 1:])
        if loss < 0.02:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.05, f"not learnt: loss {loss}"
    return model.eval().requires_grad_(False)
