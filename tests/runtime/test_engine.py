"""The loop of the engine: rows that end, draws, calls of tools, and what is refused."""

import pytest
import torch

import runtime.generation.engine
from runtime.generation.answers import Answer, Sampling
from runtime.generation.any_model import CachedSession
from runtime.generation.engine import Engine
from runtime.generation.packed_session import PackedSession
from runtime.tools.calls import Call
from tests.runtime.conversing import (
    CALL,
    END,
    FINAL,
    PROMPT,
    RESULT,
    Calculator,
    asker,
    encode,
    letters,
)
from tests.tiny import tiny_llama, tiny_mamba


def sampling(**changes) -> Sampling:
    plain = {"temperature": 1, "top_p": 1, "max_own_tokens": 24, "max_calls": 2, "seed": 0}
    return Sampling(**{**plain, **changes})


def packed(model, tools=None, **options) -> Engine:
    return Engine(model, letters(), tools, half_weights=False, **options)


def cached(model, tools=None) -> Engine:
    """An engine that takes the path of any model."""
    engine = packed(model, tools)
    engine._packed = None
    return engine


GREEDY = sampling(temperature=0, max_own_tokens=64)
PROMPTS = [encode(text) for text in ("one", "two and three", "4", "five!")]
PATHS = pytest.mark.parametrize("make", [packed, cached])


# --- rows ------------------------------------------------------------------------------------


@PATHS
def test_the_same_call_gives_the_same_bits(make) -> None:
    engine = make(tiny_llama())
    assert engine.answer(PROMPTS, 3, sampling()) == engine.answer(PROMPTS, 3, sampling())


@PATHS
def test_candidates_prompts_and_seeds_draw_differently(make) -> None:
    engine = make(tiny_llama())
    same_prompt_twice = engine.answer([PROMPTS[0]] * 2, 2, sampling())
    other_seed = engine.answer([PROMPTS[0]], 1, sampling(seed=1))
    every = [a.tokens for group in [*same_prompt_twice, *other_seed] for a in group]
    assert len({tuple(tokens) for tokens in every}) == 5


@PATHS
def test_an_answer_does_not_depend_on_the_rows_beside_it(make) -> None:
    """As long as no two choices are as close as rounding, which they are not here."""
    engine = make(tiny_llama())
    together = engine.answer(PROMPTS, 3, sampling())
    assert [a.tokens for a in engine.answer(PROMPTS[:1], 3, sampling())[0]] == [
        a.tokens for a in together[0]
    ]
    waves = packed(tiny_llama(), rows_at_once=3).answer(PROMPTS, 3, sampling())
    assert [[a.tokens for a in g] for g in waves] == [[a.tokens for a in g] for g in together]


@PATHS
def test_rows_that_ended_take_part_in_no_further_step(make, monkeypatch) -> None:
    rows = []
    session = PackedSession if make is packed else CachedSession
    feed = session._feed

    def counted(self, tokens, ready):
        rows.append(len(tokens))
        return feed(self, tokens, ready)

    monkeypatch.setattr(session, "_feed", counted)
    same_length = [encode(text) for text in ("one", "two", "six")]
    answers = make(tiny_llama()).answer(same_length, 4, sampling(temperature=2))
    lengths = [len(a.tokens) for group in answers for a in group]
    assert {a.finished for g in answers for a in g} == {"eos", "length"}
    assert rows == [sum(length > step for length in lengths) for step in range(1, max(lengths))]


def test_an_answer_ends_at_each_of_several_end_tokens() -> None:
    model = tiny_llama()
    plain = packed(model).answer(PROMPTS[:1], 1, GREEDY)[0][0].tokens
    model.generation_config.eos_token_id = [plain[4], 95]
    answer = packed(model).answer(PROMPTS[:1], 1, GREEDY)[0][0]
    assert answer.tokens == plain[: plain.index(plain[4]) + 1] and answer.finished == "eos"
    assert answer.text == letters().decode(answer.tokens[:-1])


def test_no_prompts_give_no_answers() -> None:
    assert packed(tiny_llama()).answer([], 4, sampling()) == []


@PATHS
def test_an_answer_ends_where_the_context_does(make) -> None:
    model = tiny_llama()
    model.generation_config.eos_token_id = END
    answers = make(model).answer([[5] * 120, [5] * 127, [5]], 1, sampling(max_own_tokens=20))
    lengths = [len(group[0].tokens) for group in answers]
    assert lengths[0] <= 8 and lengths[1] == 1
    assert [group[0].finished for group in answers][:2] == ["length", "length"]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "prompt 1 is empty"), ([1] * 128, "prompt 1 has 128 tokens; the model's context is 128")],
)
def test_a_prompt_that_cannot_be_answered_is_refused(prompt: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        packed(tiny_llama()).answer([[1], prompt], 1, sampling())


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1}, {"top_p": 0}, {"max_own_tokens": 0}, {"max_calls": -1}]
)
def test_sampling_that_makes_no_sense_is_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        sampling(**wrong)


def test_no_candidates_are_refused() -> None:
    with pytest.raises(ValueError, match="candidates is 0"):
        packed(tiny_llama()).answer(PROMPTS, 0, sampling())


# --- tools -----------------------------------------------------------------------------------


def texts(answer: Answer) -> tuple[str, str]:
    """What the model wrote, and what was inserted."""
    own = [t for t, mine in zip(answer.tokens, answer.own, strict=True) if mine and t != END]
    inserted = [t for t, mine in zip(answer.tokens, answer.own, strict=True) if not mine]
    return letters().decode(own), letters().decode(inserted)


@PATHS
def test_a_call_is_run_and_its_result_inserted_and_read(make) -> None:
    tools = Calculator()
    (answer,) = make(asker(), tools).answer([encode(PROMPT)], 1, GREEDY)[0]
    assert answer.text == CALL + RESULT + FINAL
    assert texts(answer) == (CALL + FINAL, RESULT)
    assert [(call.text, result.value) for call, result in answer.calls] == [(CALL, 408)]
    assert answer.finished == "eos" and answer.tokens[-1] == END and not answer.forged
    assert len(answer.log_probs) == sum(answer.own) == len(CALL + FINAL) + 1


@PATHS
def test_log_probabilities_behind_a_result_know_of_it(make) -> None:
    (answer,) = make(asker(), Calculator()).answer([encode(PROMPT)], 1, GREEDY)[0]
    whole = torch.tensor([encode(PROMPT) + answer.tokens])
    logits = asker()(whole).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1)
    own = [logits[i, t].item() for i, t in enumerate(answer.tokens) if answer.own[i]]
    assert answer.log_probs == pytest.approx(own, abs=1e-4)


def test_calls_of_all_rows_are_run_together_and_other_rows_go_on() -> None:
    tools = Calculator()
    others = [encode("hello"), encode("this is another")]
    alone = packed(asker()).answer(others, 2, GREEDY)
    both = packed(asker(), tools).answer([encode(PROMPT), *others], 2, GREEDY)
    assert tools.asked == [[CALL, CALL]]
    assert [a.text for a in both[0]] == [CALL + RESULT + FINAL] * 2
    assert [[a.tokens for a in g] for g in both[1:]] == [[a.tokens for a in g] for g in alone]


@PATHS
def test_a_result_longer_than_a_step_takes_is_read_whole(make) -> None:
    (answer,) = make(asker(), Calculator(10**49)).answer([encode(PROMPT)], 1, GREEDY)[0]
    assert texts(answer)[1] == f"<<result>>{10**49}\n"
    whole = torch.tensor([encode(PROMPT) + answer.tokens])
    logits = asker()(whole).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1)
    own = [logits[i, t].item() for i, t in enumerate(answer.tokens) if answer.own[i]]
    assert answer.log_probs == pytest.approx(own, abs=1e-3)


@PATHS
def test_a_call_beyond_the_most_is_not_run_and_ends_the_answer(make) -> None:
    tools = Calculator()
    (answer,) = make(asker(), tools).answer(
        [encode(PROMPT)], 1, sampling(temperature=0, max_own_tokens=64, max_calls=0)
    )[0]
    assert (answer.text, answer.finished, answer.calls) == (CALL, "calls", [])
    assert tools.asked == []


def test_a_call_completed_by_the_last_own_token_is_not_run() -> None:
    limited = sampling(temperature=0, max_own_tokens=len(CALL))
    (answer,) = packed(asker(), Calculator()).answer([encode(PROMPT)], 1, limited)[0]
    assert (answer.text, answer.finished, answer.calls) == (CALL, "length", [])


def test_a_result_that_does_not_fit_into_the_context_ends_the_answer() -> None:
    (answer,) = packed(asker(), Calculator("0" * 200)).answer([encode(PROMPT)], 1, GREEDY)[0]
    assert (answer.text, answer.finished, len(answer.calls)) == (CALL, "length", 1)
    assert all(answer.own)


def test_a_result_that_the_model_writes_is_noted_and_not_taken_for_one() -> None:
    forger = asker(PROMPT + "<<result>>7\n" + CALL + RESULT + FINAL)
    (answer,) = packed(forger, Calculator()).answer([encode(PROMPT)], 1, GREEDY)[0]
    assert answer.forged and texts(answer)[1] == RESULT
    assert texts(answer)[0] == "<<result>>7\n" + CALL + FINAL


def test_without_tools_a_call_is_text() -> None:
    (answer,) = packed(asker()).answer([encode(PROMPT)], 1, GREEDY)[0]
    assert answer.text.startswith(CALL) and answer.calls == [] and all(answer.own)


def test_a_recurrent_model_reads_results_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def eager(text: str) -> Call | None:
        """Takes any five characters for a call."""
        return Call("calc", {"expression": "2*3"}, "2*3") if len(text) >= 5 else None

    monkeypatch.setattr(runtime.generation.engine, "find_call", eager)
    answers = packed(tiny_mamba(), Calculator()).answer(
        [encode("hi"), encode("you")], 2, sampling()
    )
    for prompt, group in zip(("hi", "you"), answers, strict=True):
        for answer in group:
            assert answer.finished == "eos" or len(answer.calls) == 2
            logits = tiny_mamba()(torch.tensor([encode(prompt) + answer.tokens])).logits[0]
            log_probs = logits[len(prompt) - 1 : -1].log_softmax(-1)
            own = [log_probs[i, t].item() for i, t in enumerate(answer.tokens) if answer.own[i]]
            assert answer.log_probs == pytest.approx(own, abs=1e-4)
