"""Toolformer's calls: where they are proposed, which are useful, and where they end up."""

import math
from dataclasses import replace

import pytest
import torch

from runtime.generation.answers import Sampling
from runtime.generation.engine import Engine
from runtime.prompt import inserted_tokens, prompt_tokens
from runtime.tools.calls import Call, ToolResult, find_call, write_result
from stages.formats.conversations import Conversation
from stages.toolformer.proposals import Place, Proposal, Text, find_places, opening, propose
from stages.toolformer.report import Found, write_samples
from stages.toolformer.usefulness import Judged, fading_weights, judge, keep_best, with_calls
from tests.runtime.conversing import Calculator, letters
from tests.stages.skill_dag import KNOWN, in_the_head, student
from tests.stages.test_supervision import CALL, SEGMENTS


def told(reply: str, prompt: str = "6*7?") -> Text:
    conversation = Conversation("1", "sums", (("prompt", prompt), ("own", reply)), "42")
    return Text.of(conversation, letters())


def proposal(token: int, result: int = 42, text: int = 0, code: str = "6*7") -> Proposal:
    call = find_call(f'<<py>>{{"code": "{code}"}}')
    assert isinstance(call, Call)
    return Proposal(Place(text, token, "py", 0.5), call, ToolResult(True, result, None, 0.0))


def judged(token: int, usefulness: float, **where: int) -> Judged:
    return Judged(proposal(token, **where), 3.0, 2.0, 2.0 - usefulness)


def naive_log_probs(before: list[int], following: list[int]) -> torch.Tensor:
    tokens = torch.tensor([[*before, *following]])
    scores = student()(tokens).logits[0].log_softmax(-1)
    return torch.stack([scores[len(before) - 1 + n, t] for n, t in enumerate(following)])


# --- proposals -------------------------------------------------------------------------------


def test_a_text_knows_where_each_token_of_its_reply_begins() -> None:
    text = told("That is 42.")
    assert "".join(letters().decode([t]) for t in text.reply) == "That is 42."
    assert text.starts == tuple(range(11))
    assert list(text.prompt) == prompt_tokens("6*7?", letters())


def test_a_space_that_a_tokenizer_leaves_out_of_its_offsets_belongs_to_the_word_behind() -> None:
    from tokenizers import pre_tokenizers, processors

    from tests.characters import character_tokenizer

    tokenizer = character_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    conversation = Conversation("1", "sums", (("prompt", "?"), ("own", "so é 42")), "42")
    text = Text.of(conversation, tokenizer)
    assert [conversation.reply[start:][:1] for start in text.starts] == [*"so éé 42"]


def test_texts_with_calls_are_refused() -> None:
    with pytest.raises(ValueError, match="conversation 'x' has calls already"):
        Text.of(Conversation("x", "sums", SEGMENTS, "42"), letters())


def test_places_are_the_likeliest_ones_for_a_call_to_begin() -> None:
    text = told("That is 42.")
    first = inserted_tokens(opening("py"), letters())[0]
    naive = [
        naive_log_probs([*text.prompt, *text.reply[:at]], [first]).exp().item()
        for at in range(len(text.reply))
    ]
    found = find_places(student(), text, 5, ["py"], letters(), 3, 0.0, reach=99)
    order = sorted(range(8 + 1), key=lambda at: -naive[at])  # the number begins at 8
    assert [place.token for place in found] == order[:3]
    for place in found:
        assert place.probability == pytest.approx(naive[place.token], rel=1e-3)
        assert (place.text, place.tool) == (5, "py")
    least = (naive[order[0]] + naive[order[1]]) / 2
    assert len(find_places(student(), text, 0, ["py"], letters(), 3, least, 99)) == 1


@pytest.mark.parametrize(
    ("reply", "places"),
    [
        ("That is 42.", [6, 7, 8]),
        ("42", [0]),
        ("6, 7: 42, 42!", [4, 5, 6]),  # 6 and 7 stand in the request, the second 42 behind another
        ("1 or 2", [0, 3, 4, 5]),
        ("No idea.", []),
    ],
)
def test_a_call_may_stand_only_shortly_before_a_number_that_nothing_gives_away(
    reply: str, places: list[int]
) -> None:
    assert told(reply).places(reach=3) == places
    found = find_places(student(), told(reply), 0, ["py"], letters(), 99, 0.0, reach=3)
    assert sorted(place.token for place in found) == places


def test_the_model_writes_calls_and_those_with_a_result_are_proposed() -> None:
    """It knows one problem; where it stands before another text, what it writes is no call."""
    texts = [Text.of(in_the_head(KNOWN[0]), letters())]
    engine = Engine(student(), letters(), Calculator())
    greedy = Sampling(0.0, 1.0, 32, 0, 0)
    places = [Place(0, 0, "py", 0.9), Place(0, 9, "calc", 0.1)]
    found, written = propose(engine, texts, places[:1], letters(), greedy, 3)
    assert written == 3 and len(found) == 1  # thrice the same
    assert found[0].call.text == '<<py>>{"code": "6*7"}' and found[0].result.value == 42
    assert propose(engine, texts, [], letters(), greedy, 3) == ([], 0)


def test_calls_that_fail_are_not_proposed() -> None:
    class Broken:
        def run_all(self, calls):
            return [ToolResult(False, None, "no such thing", 0.0) for _ in calls]

    texts = [Text.of(in_the_head(KNOWN[0]), letters())]
    engine = Engine(student(), letters(), Broken())
    greedy = Sampling(0.0, 1.0, 32, 0, 0)
    assert propose(engine, texts, [Place(0, 0, "py", 0.9)], letters(), greedy, 1) == ([], 1)


# --- usefulness ------------------------------------------------------------------------------


def test_weights_fade_by_a_fifth_a_token_and_sum_to_one() -> None:
    assert fading_weights(1).tolist() == [1.0]
    assert fading_weights(5).tolist() == pytest.approx([n / 15 for n in (5, 4, 3, 2, 1)])
    assert fading_weights(8)[5:].tolist() == [0.0] * 3


def test_usefulness_is_that_of_the_formula() -> None:
    text = Text.of(in_the_head(KNOWN[0]), letters())
    proposals = [proposal(0), proposal(3), proposal(0, result=40), proposal(len(text.reply) - 1)]
    found = judge(student(), [text], proposals, letters(), write_result, 5, 200)
    for one, given in zip(found, proposals, strict=True):
        at = given.place.token
        begun = [*text.prompt, *text.reply[:at]]
        following = list(text.reply[at : at + 5])
        weights = torch.tensor([max(0.0, 1 - 0.2 * n) for n in range(len(following))])
        call = letters().encode(given.call.text, add_special_tokens=False)
        result = letters().encode(f"<<result>>{given.result.value}\n", add_special_tokens=False)
        nothing, alone, both = (
            -(weights @ naive_log_probs(begun + put, following) / weights.sum()).item()
            for put in ([], call, call + result)
        )
        assert one.proposal is given
        assert one.nothing == pytest.approx(nothing, rel=1e-3, abs=1e-4)
        assert one.without_result == pytest.approx(alone, rel=1e-3, abs=1e-4)
        assert one.with_result == pytest.approx(both, rel=1e-3, abs=1e-4)
        assert one.usefulness == pytest.approx(min(nothing, alone) - both, rel=1e-3, abs=1e-3)
    assert found[0].usefulness > 0.5  # what the student has learnt to write behind it


def test_the_best_call_of_a_place_is_kept_when_it_is_useful_enough() -> None:
    weak, good, better, other = (judged(3, 0.4), judged(3, 0.6), judged(3, 0.9), judged(5, 0.5))
    assert keep_best([weak, good, better, other], 0.5) == [better, other]
    assert keep_best([better, good], 0.5) == [better]
    assert keep_best([judged(3, 0.7, text=1), good], 0.5) == [judged(3, 0.7, text=1), good]
    assert keep_best([weak], 0.5) == []


# --- the texts that are learnt from ----------------------------------------------------------


def test_kept_calls_stand_at_their_characters_in_the_order_of_the_text() -> None:
    texts = [told("no call here"), told("First 12, then 42. FINAL: 42")]
    kept = [judged(15, 1.0, text=1), judged(6, 1.0, text=1, result=12)]
    (made,) = with_calls(texts, kept, write_result)
    call = '<<py>>{"code": "6*7"}'
    assert made.reply == (f"First {call}<<result>>12\n12, then {call}<<result>>42\n42. FINAL: 42")
    assert made.id == "toolformer/1" and made.answer == "42" and made.prompt == "6*7?"


def test_of_a_text_with_calls_the_calls_alone_are_taught() -> None:
    (made,) = with_calls([told("That is 42. FINAL: 42")], [judged(8, 1.0)], write_result)
    assert made.segments[1:] == (
        ("recited", "That is "),
        ("own", '<<py>>{"code": "6*7"}'),
        ("result", "<<result>>42\n"),
        ("recited", "42. FINAL: 42"),
    )
    (made,) = with_calls([told("42")], [judged(0, 1.0)], write_result)
    assert [kind for kind, _ in made.segments] == ["prompt", "own", "result", "recited"]


# --- the report ------------------------------------------------------------------------------


def test_a_call_is_to_the_point_when_its_result_is_the_next_number_of_the_text(tmp_path) -> None:
    texts = [told("That is 42. FINAL: 42")]
    good, early = judged(8, 1.0), judged(0, 0.9)  # before the number, and at the very beginning
    part, wrong = judged(8, 0.8, result=4), judged(8, 0.7, result=7)
    found = Found(texts, 9, [good, early, part, wrong], [good, early, part], [])
    assert found.counts["calls_to_the_point"] == 2
    assert found.counts["calls_written"] == 9 and found.counts["calls_kept"] == 3
    write_samples(found, tmp_path / "samples.md")
    kept, refused = (tmp_path / "samples.md").read_text().split("## Refused")
    assert kept.count("usefulness") == 3 and refused.count("usefulness +0.700") == 1
    assert f"{good.proposal.call.text} -> 42" in kept


def test_what_is_judged_is_finite_even_at_the_end_of_a_text() -> None:
    text = told("4")
    (one,) = judge(student(), [text], [proposal(0)], letters(), write_result, 5, 200)
    assert all(map(math.isfinite, (one.nothing, one.without_result, one.with_result)))
    assert replace(one, with_result=0.0).usefulness == min(one.nothing, one.without_result)
    assert CALL not in text.conversation.reply
