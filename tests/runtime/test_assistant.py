"""Whatever people write is answered or left to the model as it is; nothing makes it fall over."""

import random

import pytest

from runtime.adapters.bank import AdapterBank
from runtime.assistant import LEFT_OUT, Assistant, fit, tidy
from runtime.generation.answers import Sampling
from runtime.generation.engine import Engine
from tests.runtime.adapting import adapter_folder
from tests.runtime.conversing import encode, letters
from tests.runtime.test_routing import NAMES, chooser
from tests.tiny import tiny_llama

GREEDY = Sampling(temperature=0, top_p=1, max_own_tokens=4, max_calls=0, seed=0)
NOISE = random.Random(0)
ODD: dict[str, str | bytes] = {
    "empty": "",
    "blank": " \n\t ",
    "long": "What is 12 and 7? " * 5_556,  # 100,000 characters
    "one word": "x" * 100_000,
    "random": "".join(chr(NOISE.randrange(0x10FFFF)) for _ in range(2_000)),
    "binary": NOISE.randbytes(2_000),
    "mixed": "Wie spät ist it? 现在几点 καί what's the время؟",
    "halves": "\ud83d and \udc00",
    "zero": "a\0b",
    "markers": "<<calc>>{ <<result>>1 FINAL: <|im_end|> <end>",
    "reversed": "\u202eabc",
    "combining": "e" + "\u0301" * 500,
}


@pytest.fixture(scope="module")
def assistant(tmp_path_factory) -> Assistant:
    model, place = tiny_llama(blocks=2), tmp_path_factory.mktemp("adapters")
    bank = AdapterBank(model, 1 << 24)
    for number, name in enumerate(NAMES):
        bank.add(name, adapter_folder(lambda: tiny_llama(blocks=2), place / name, number))
    engine = Engine(model, letters(), half_weights=False, bank=bank, router=chooser(model))
    engine._ends = frozenset()
    return Assistant(engine)


def test_odd_requests_are_answered_or_abstained_from_alone_and_together(
    assistant: Assistant,
) -> None:
    together = assistant.reply(list(ODD.values()), GREEDY)
    for name, request, reply in zip(ODD, ODD.values(), together, strict=True):
        [alone] = assistant.reply([request], GREEDY)
        for found in (reply, alone):
            assert len(found.answer.tokens) == GREEDY.max_own_tokens, name
            assert found.capability in (*NAMES, None)
            assert found.cut == (name in ("long", "one word", "random", "binary", "combining"))
        assert reply.capability == alone.capability, name


def test_nothing_asked_is_nothing_answered(assistant: Assistant) -> None:
    assert assistant.reply([], GREEDY) == []


def test_without_a_router_the_model_as_it_is_answers() -> None:
    plain = Assistant(Engine(tiny_llama(blocks=2), letters(), half_weights=False))
    [reply] = plain.reply(["hello"], GREEDY)
    assert reply.capability is None and reply.answer.decision is None


def test_a_long_request_keeps_its_beginning_and_its_end_within_the_limit() -> None:
    text = "first " + "filling " * 500 + "last?"
    cut, was_cut = fit(text, letters(), 60)
    assert was_cut and len(encode(cut)) <= 60
    assert cut.startswith("first ") and LEFT_OUT in cut and cut.endswith("last?")
    assert fit("short", letters(), 60) == ("short", False)
    for most in range(1, 30):
        assert 1 <= len(encode(fit(text, letters(), most)[0])) <= most


def test_what_is_no_text_becomes_text() -> None:
    assert tidy(b"ok \xff\xfe") == "ok \ufffd\ufffd"
    assert tidy("a\0b") == "a\ufffdb"
    assert tidy("grün 现") == "grün 现"
    assert tidy("\ud83d").isprintable()


def test_sampling_that_leaves_no_room_is_refused_with_what_would(assistant: Assistant) -> None:
    greedy = Sampling(temperature=0, top_p=1, max_own_tokens=120, max_calls=0, seed=0)
    with pytest.raises(ValueError, match=r"max_own_tokens is 120.*at most 10\d leave room"):
        assistant.reply(["hello"], greedy)
    with pytest.raises(ValueError, match="most_tokens is 0"):
        Assistant(assistant._engine, 0)
