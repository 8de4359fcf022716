"""Rewards: pure, in TRL's form, and nothing pays but what they are for."""

import itertools
import math
import random

import pytest

from stages.grpo.rewards import (
    NAMES,
    brevity,
    citation,
    correctness,
    format_of,
    judged,
    make_rewards,
    require_weights,
    symbol_compression,
    text_of,
    weighted_sum,
)

WEIGHTS = {
    "correctness": 1.0, "format": 0.2, "brevity": 0.3, "symbols": 0.1, "citation": 0.1,
    "judge": 0.01,
}  # fmt: skip
CALL = '<<calc>>{"expression": "12*34"}'
RIGHT = f"Multiply 12 by 34.\n{CALL}<<result>>408\nFINAL: 408"
WRONG = f"Add 12 and 34.\n{CALL}<<result>>408\nFINAL: 46"
MEAN = "<define symbol=M: the mean of both>"


def count(text: str) -> int:
    return len(text.split())


def right(text: str, answer: str | None = "408") -> float:
    return correctness([text], answer=[answer])[0]


def formed(text: str) -> float:
    return format_of([text])[0]


# --- TRL's form ------------------------------------------------------------------------------


def test_strings_and_messages_are_worth_the_same() -> None:
    messages = [
        {"role": "assistant", "content": f"Multiply 12 by 34.\n{CALL}"},
        {"role": "tool", "name": "calc", "content": "408"},
        {"role": "assistant", "content": "FINAL: 408"},
    ]
    assert text_of(messages) == RIGHT
    columns = {"answer": ["408", "408"], "prompts": ["?", [{"role": "user", "content": "?"}]]}
    for reward in make_rewards(WEIGHTS, count, 80, lambda prompts, replies: [0.0, 0.0]).values():
        first, second = reward([RIGHT, messages], **columns, trainer_state=None, completion_ids=[])
        assert first == second


def test_no_text_at_all_is_worth_nothing() -> None:
    for empty in ("", "   \n", [], [{"role": "assistant", "content": None}, {"role": "assistant"}]):
        assert correctness([empty], answer=["408"]) == format_of([empty]) == [0.0]


# --- correctness and format ------------------------------------------------------------------


def test_the_right_answer_in_the_right_form() -> None:
    assert right(RIGHT) == formed(RIGHT) == 1
    assert right(WRONG) == 0 and formed(WRONG) == 1
    assert right(RIGHT, answer=None) == 0
    assert formed("Write it with cat <<EOF >> file.\nFINAL: cat") == 1


@pytest.mark.parametrize(
    "text",
    [
        "FINAL: 407\nFINAL: 408",
        "FINAL: 408\nFINAL: 408",
        '<<calc>>{"expression": "FINAL: 408"}<<result>>1\n',
        f'{CALL}<<result>>"x"\nFINAL: 407 408',
        "FINAL: ٤٠٨",
        "FINAL: nan",
        "FINAL: inf",
        "FINAL: 408e999999999",
        "FINAL: 1e400",
        "FINAL: 400 to 410",
        "FINAL:",
        "FINAL: " + "408 " * 10_000,
    ],
)
def test_hacking_attempts_are_not_right(text: str) -> None:
    assert right(text) == 0


@pytest.mark.parametrize(
    "text",
    [
        "<<result>>408\nFINAL: 408",
        "Multiply. <<result>>408\nFINAL: 408",
        '<<result>>{"value": 408}<<result>>408\nFINAL: 408',
        f"{CALL}<<result>>408\n<<result>>408\nFINAL: 408",
        f"{CALL}\n<<result>>408\nFINAL: 408",
        f"{CALL}\nFINAL: 408",
        f'{CALL}<<result>>{{"error": "no"}}\nFINAL: 408',
        '<<calc>>{"expression": "12*34"\nFINAL: 408',
        "<<calc>>12*34\nFINAL: 408",
        "FINAL: 408\nand so on",
        "FINAL: 408\nFINAL: 408",
        "FINAL:  ",
        "408",
    ],
)
def test_forged_results_and_other_faults_get_no_format_reward(text: str) -> None:
    assert formed(text) == 0


# --- brevity and symbols ---------------------------------------------------------------------


def test_a_shorter_right_answer_is_worth_more() -> None:
    reward = brevity(count, longest_tokens=40)
    long, short = RIGHT.replace("Multiply", "Well now let us multiply"), RIGHT.partition("\n")[2]
    values = reward([long, RIGHT, short, "word " * 50 + RIGHT], answer=["408"] * 4)
    assert 0 < values[0] < values[1] < values[2] < 1 and values[3] == 0


def test_a_long_result_does_not_make_an_answer_longer() -> None:
    longer = RIGHT.replace("<<result>>408", f'<<result>>"{"408 " * 30}"')
    first, second = brevity(count, 40)([RIGHT, longer], answer=["408"] * 2)
    assert first == second


def test_symbols_are_rewarded_for_what_they_save_and_cost() -> None:
    reward = symbol_compression(count)
    texts = [f"{MEAN}{' then M' * uses}\nFINAL: 408" for uses in (0, 1, 2, 5)] + [RIGHT]
    none, once, twice, often, plain = reward(texts, answer=["408"] * 5)
    assert none < once < twice == plain == 0 < often < 1


def test_symbols_inside_calls_and_results_save_nothing() -> None:
    text = f'{MEAN}<<py>>{{"code": "M + M + M - M * M"}}<<result>>"M is M or M"\nFINAL: 408'
    assert symbol_compression(count)([text], answer=["408"])[0] < 0


@pytest.mark.parametrize("make", [lambda: brevity(count, 80), lambda: symbol_compression(count)])
def test_a_wrong_answer_gains_nothing_by_being_short_or_dense(make) -> None:
    dense = f"{MEAN}{' then M' * 20}"
    texts = ["", "FINAL: 46", WRONG, f"{dense}\nFINAL: 46", dense, "FINAL: 408\nFINAL: 408"]
    assert make()(texts, answer=["408"] * len(texts)) == [0.0] * len(texts)


# --- citation and judge ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("As [2] says.", 1.0),
        ("As [1] and [2] say.", 0.5),
        ("As [2] and [9] say, [2].", 0.5),
        ("No source.", 0.0),
        ("[0] [4] [999]", 0.0),
        ("As [٢] says.", 0.0),
        ('<<py>>{"code": "[2]"}<<result>>"[2]"\nFINAL: 1', 0.0),
    ],
)
def test_a_citation_counts_if_it_exists_and_is_needed(text: str, share: float) -> None:
    assert citation([text], sources=[3], needed=[[2, 7]]) == [share]


def test_without_sources_there_is_no_reward_for_citing() -> None:
    assert citation(["As [1] says."]) == [0.0]
    assert citation(["As [1] says."], sources=[None], needed=[None]) == [0.0]


def test_a_judge_orders_answers_that_are_otherwise_alike() -> None:
    rewards = make_rewards(WEIGHTS, count, 80, lambda prompts, replies: map(len, replies))
    texts = [RIGHT, RIGHT.replace("12 by 34", "twelve by thirty-four")]
    totals, parts = weighted_sum(rewards, WEIGHTS, texts, prompts=["?"] * 2, answer=["408"] * 2)
    assert parts["judge"][0] < parts["judge"][1] and totals[0] < totals[1]


def test_a_judge_never_reorders_what_differs_by_more_than_its_weight() -> None:
    rng = random.Random(0)
    texts = [RIGHT, WRONG, "", "FINAL: 408", f"{MEAN} M\nFINAL: 408", "word " * 30 + RIGHT]
    columns = {"answer": ["408"] * len(texts), "prompts": ["?"] * len(texts)}
    for _ in range(50):
        opinions = [rng.choice([-1e300, -5.0, 0.0, 5.0, 1e300]) for _ in texts]
        rewards = make_rewards(WEIGHTS, count, 80, lambda prompts, replies: opinions)  # noqa: B023
        totals, parts = weighted_sum(rewards, WEIGHTS, texts, **columns)
        rest = [
            total - WEIGHTS["judge"] * part
            for total, part in zip(totals, parts["judge"], strict=True)
        ]
        for a, b in itertools.permutations(range(len(texts)), 2):
            if rest[a] - rest[b] > WEIGHTS["judge"]:
                assert totals[a] > totals[b]


@pytest.mark.parametrize("scores", [[math.nan], [math.inf], [], [1.0, 2.0]])
def test_a_judge_that_fails_is_noticed(scores: list[float]) -> None:
    with pytest.raises(ValueError, match="one number each"):
        judged(lambda prompts, replies: scores)(["x"], prompts=["?"])


# --- weights ---------------------------------------------------------------------------------


def test_the_sum_is_weighted_and_reward_by_reward() -> None:
    weights = {"correctness": 2.0, "format": 0.5}
    rewards = make_rewards(weights, count, 80)
    totals, parts = weighted_sum(rewards, weights, [RIGHT, WRONG, ""], answer=["408"] * 3)
    assert totals == [2.5, 0.5, 0.0]
    assert parts == {"correctness": [1.0, 0.0, 0.0], "format": [1.0, 1.0, 0.0]}


def test_a_right_answer_beats_every_wrong_one() -> None:
    wordy = "word " * 500 + f"{MEAN} FINAL now\nFINAL: 408\nand more"
    cites = "[1] says so.\nFINAL: 46"
    columns = {"answer": ["408"] * 2, "sources": [1, 1], "needed": [[1], [1]], "prompts": ["?"] * 2}
    rewards = make_rewards(WEIGHTS, count, 80, lambda prompts, replies: [-1e9, 1e9])
    totals, _ = weighted_sum(rewards, WEIGHTS, [wordy, cites], **columns)
    assert totals[0] > totals[1]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"correctnes": 1.0}, "unknown reward 'correctnes'"),
        ({"correctness": 1.0, "format": -0.1}, "from 0 on"),
        ({"correctness": math.nan}, "from 0 on"),
        ({"correctness": 1.0, "format": 0.2, "judge": 0.1}, "break ties"),
        ({"judge": 0.1}, "break ties"),
        ({"correctness": 0.2, "format": 0.2}, "has to weigh more"),
        ({"format": 1.0}, "has to weigh more"),
    ],
)
def test_weights_that_reward_the_wrong_thing_are_refused(
    weights: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        require_weights(weights)


def test_a_judge_with_a_weight_has_to_be_there() -> None:
    with pytest.raises(ValueError, match="there is none"):
        make_rewards(WEIGHTS, count, 80)
    rewards = make_rewards(WEIGHTS, count, 80, lambda prompts, replies: [])
    assert tuple(rewards) == NAMES
    assert len({reward.__name__ for reward in rewards.values()}) == len(NAMES), "TRL logs by name"
