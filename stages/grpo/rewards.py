"""Rewards: what an answer is worth, as pure functions of what was written.

Each takes TRL's arguments, f(completions, **columns), and gives a number a completion. A completion
is a string or a list of messages, as TRL hands them over. Columns are those of the data set, a
value a completion: `answer` (the right one), `prompts`, and for citations `sources` and `needed`.

    correctness   1 when the one FINAL of the answer is the right one      verified, not judged
    format        1 for calls with results, none forged, one FINAL at the end
    brevity       up to 1, the shorter the better                          only when correct
    symbols       what defined symbols save, -1 to 1                       only when correct
    citation      share of the cited sources [n] that are there and needed
    judge         a frozen model's opinion, 0 to 1; its weight is so small that it breaks ties alone

Nano-Cog's rewards paid for length without looking at the answer, and let the judge decide. Here
nothing that a wrong answer can collect outweighs being right (`require_weights`).
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from runtime.symbols import CountTokens, read_symbols
from stages.formats.answers import FINAL, Reply, final_answer, read_reply, same_answer
from stages.formats.conversations import RESULT_MARK

Message = Mapping[str, Any]
Completion = str | Sequence[Message]
Reward = Callable[..., list[float]]
Judge = Callable[[Sequence[str], Sequence[str]], Sequence[float]]  # prompts, replies -> scores

NAMES = ("correctness", "format", "brevity", "symbols", "citation", "judge")
JUDGE_SHARE = 0.1  # of the smallest other weight: the most that a judge may weigh
MARK = re.compile(r"<<[A-Za-z_]\w*>>", re.ASCII)  # opens a call or a result
CITED = re.compile(r"\[(\d{1,3})\]", re.ASCII)


def text_of(completion: Completion) -> str:
    """A completion as one text; messages of tools become results."""
    if isinstance(completion, str):
        return completion
    parts = []
    for message in completion:
        content = message.get("content") or ""  # a message may hold tool calls alone
        if message["role"] == "tool" and not content.startswith(RESULT_MARK):
            content = f"{RESULT_MARK}{content}\n"
        parts.append(content)
    return "".join(parts)


def correctness(
    completions: Sequence[Completion],
    answer: Sequence[str | None],
    prompts: Sequence[Completion] | None = None,
    **columns: Any,
) -> list[float]:
    """1 for each completion whose one FINAL is the right answer, else 0.

    A completion without a right answer to compare with (None) gets 0.
    """
    del columns
    asked = [text_of(prompt) for prompt in prompts] if prompts else [""] * len(completions)
    return [
        float(right is not None and same_answer(final_answer(text_of(given)), right, question))
        for given, right, question in zip(completions, answer, asked, strict=True)
    ]


def format_of(completions: Sequence[Completion], **columns: Any) -> list[float]:
    """1 for each completion that keeps to the form of an answer, else 0."""
    del columns
    return [float(_well_formed(read_reply(text_of(given)))) for given in completions]


def brevity(count_tokens: CountTokens, longest_tokens: int) -> Reward:
    """Reward short answers: 1 for none at all down to 0 at `longest_tokens`, only when correct.

    Counted is what the model wrote, calls included and results not.
    """

    def reward(completions: Sequence[Completion], **columns: Any) -> list[float]:
        right = correctness(completions, **columns)
        return [
            max(0.0, 1 - count_tokens(_written(given)) / longest_tokens) if is_right else 0.0
            for given, is_right in zip(completions, right, strict=True)
        ]

    return _named("brevity", reward)


def symbol_compression(count_tokens: CountTokens) -> Reward:
    """Reward symbols that pay: net tokens saved over the tokens of the expanded answer, -1 to 1.

    Only when correct; negative where definitions cost more than their uses save.
    """

    def saving(given: Completion) -> float:
        read = read_symbols(read_reply(text_of(given)).said, count_tokens)
        compression = read.compression(count_tokens)
        written = compression.net_tokens + count_tokens(_written(given))
        return max(-1.0, min(1.0, compression.net_tokens / max(written, 1)))

    def reward(completions: Sequence[Completion], **columns: Any) -> list[float]:
        right = correctness(completions, **columns)
        return [
            saving(given) if is_right else 0.0
            for given, is_right in zip(completions, right, strict=True)
        ]

    return _named("symbols", reward)


def citation(
    completions: Sequence[Completion],
    sources: Sequence[int | None] | None = None,
    needed: Sequence[Sequence[int] | None] | None = None,
    **columns: Any,
) -> list[float]:
    """The share of cited sources that exist and are needed; 0 where none are given or cited.

    sources: how many there are, [1] to [n].  needed: those that the answer stands in.
    """
    del columns
    if sources is None or needed is None:
        return [0.0] * len(completions)
    return [
        _share_cited(given, count, wanted)
        for given, count, wanted in zip(completions, sources, needed, strict=True)
    ]


def judged(judge: Judge) -> Reward:
    """A judge's scores, squashed into 0 to 1 with their order kept.

    Raises ValueError for a score that is no number: a judge that fails must not go unnoticed.
    """

    def reward(
        completions: Sequence[Completion], prompts: Sequence[Completion], **columns: Any
    ) -> list[float]:
        del columns
        replies = [text_of(given) for given in completions]
        scores = list(judge([text_of(prompt) for prompt in prompts], replies))
        if len(scores) != len(replies) or not all(math.isfinite(score) for score in scores):
            raise ValueError(f"the judge gave {scores} for {len(replies)} answers; one number each")
        return [0.5 + math.atan(score) / math.pi for score in scores]

    return _named("judge", reward)


def make_rewards(
    weights: Mapping[str, float],
    count_tokens: CountTokens,
    longest_tokens: int,
    judge: Judge | None = None,
) -> dict[str, Reward]:
    """The reward functions that weigh anything, by name.

    Raises ValueError for weights that `require_weights` refuses, or a judge that is missing.
    """
    require_weights(weights)
    if weights.get("judge") and judge is None:
        raise ValueError("the judge has a weight and there is none; set its weight to 0")
    functions: dict[str, Reward | None] = {
        "correctness": correctness,
        "format": format_of,
        "brevity": brevity(count_tokens, longest_tokens),
        "symbols": symbol_compression(count_tokens),
        "citation": citation,
        "judge": judged(judge) if judge else None,
    }
    return {
        name: function for name, function in functions.items() if weights.get(name) and function
    }


def require_weights(weights: Mapping[str, float]) -> None:
    """Refuse weights by which a wrong answer could beat a right one, or the judge a rule."""
    unknown = set(weights) - set(NAMES)
    if unknown:
        raise ValueError(f"unknown reward '{min(unknown)}'; there are {', '.join(NAMES)}")
    bad = {name: weight for name, weight in weights.items() if not 0 <= weight < math.inf}
    if bad:
        raise ValueError(f"weights of rewards are numbers from 0 on; found {bad}")
    others = [weight for name, weight in weights.items() if weight and name != "judge"]
    judge = weights.get("judge", 0.0)
    if judge > JUDGE_SHARE * min(others, default=0.0):
        raise ValueError(
            f"the judge weighs {judge}; it may only break ties: at most {JUDGE_SHARE} of the "
            "smallest other weight"
        )
    without = sum(weights.get(name, 0.0) for name in ("format", "citation", "symbols", "judge"))
    if weights.get("correctness", 0.0) <= without:
        raise ValueError(
            f"correctness weighs {weights.get('correctness', 0.0)} and what a wrong answer can be "
            f"ahead by {without:g}; being right has to weigh more"
        )


def weighted_sum(
    rewards: Mapping[str, Reward],
    weights: Mapping[str, float],
    completions: Sequence[Completion],
    **columns: Any,
) -> tuple[list[float], dict[str, list[float]]]:
    """The total of each completion, and what each reward gave before its weight."""
    parts = {name: reward(completions, **columns) for name, reward in rewards.items()}
    totals = [
        math.fsum(weights[name] * part[place] for name, part in parts.items())
        for place in range(len(completions))
    ]
    return totals, parts


def _named(name: str, reward: Reward) -> Reward:
    """The same function under a name of its own: TRL logs rewards by their functions' names."""
    reward.__name__ = name
    return reward


def _well_formed(reply: Reply) -> bool:
    """Whether every call has a result that is no error, none is forged, and FINAL ends it all."""
    failed = any(result.startswith('{"error"') for result in reply.results)
    broken = any(MARK.search(own) for own in reply.own)
    if failed or broken or reply.forged or len(reply.results) != len(reply.calls):
        return False
    lines = reply.said.strip().splitlines()
    finals = FINAL.findall(reply.said)
    return len(finals) == 1 and bool(finals[0].strip()) and bool(FINAL.fullmatch(lines[-1]))


def _written(given: Completion) -> str:
    """What the model wrote itself: all but results."""
    reply = read_reply(text_of(given))
    pairs = zip(reply.own, (*reply.calls, ""), strict=True)
    return "".join(own + call for own, call in pairs)


def _share_cited(given: Completion, count: int | None, needed: Sequence[int] | None) -> float:
    cited = {int(number) for number in CITED.findall(read_reply(text_of(given)).said)}
    if not count or needed is None or not cited:
        return 0.0
    good = {number for number in needed if 1 <= number <= count}
    return len(cited & good) / len(cited)
