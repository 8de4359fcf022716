"""How answers are drawn, and what an answer is.

The tokens of an answer are in segments: own ones, which the model sampled, and inserted ones, a
tool's result. A result's text is tokenised alone, and own tokens stay as they were sampled, so a
border between segments is always a border between tokens. Who trains on such rows has to tokenise
each segment alone, too: tokens that reach across a border would be others than the model ever sees.
"""

import hashlib
import struct
from dataclasses import dataclass, field
from typing import Any, Literal

from modeling.router import Decision

Finish = Literal["eos", "length", "calls"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, and when an answer ends at the latest.

    temperature: 0 takes the most likely token. top_p: draw from the fewest tokens that hold this
    share (Holtzman 2020). max_calls: a call beyond it is not run and ends the answer.
    """

    temperature: float
    top_p: float
    max_own_tokens: int
    max_calls: int
    seed: int

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1 (all)")
        if self.max_own_tokens < 1:
            raise ValueError(f"max_own_tokens is {self.max_own_tokens}; it must be 1 or more")
        if self.max_calls < 0:
            raise ValueError(f"max_calls is {self.max_calls}; it must be 0 or more")


@dataclass(frozen=True)
class Answer:
    """What a model wrote behind a prompt, and what tools inserted.

    log_probs: one for each own token, of the distribution at the sampling temperature (at
    temperature 1 for greedy answers), before top_p cuts it: with top_p 1 exactly what the token was
    drawn by. An end-of-text token is the last own token, and no part of the text.
    finished: by the end-of-text token, by max_own_tokens or the model's context, or by a call
    beyond max_calls. forged: the model wrote the marker of a result itself. decision: the router's,
    of the prompt, where one was asked.
    """

    tokens: list[int]
    own: list[bool]
    log_probs: list[float]
    text: str
    calls: list[tuple[Any, Any]]  # (Call or BadCall, ToolResult)
    finished: Finish
    forged: bool
    decision: Decision | None = None


@dataclass
class Row:
    """An answer while it is written."""

    prompt: int  # which prompt
    candidate: int  # which of its answers
    room: int  # tokens that fit behind the prompt
    decision: Decision | None = None
    tokens: list[int] = field(default_factory=list)
    own: list[bool] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    calls: list[tuple[Any, Any]] = field(default_factory=list)
    watched: int = 0  # calls are looked for in the tokens from here on
    forged: bool = False
    finished: Finish | None = None

    def uniform(self, seed: int) -> float:
        """The random number in [0, 1) that draws the next own token.

        It depends on the seed, the prompt's index, the candidate and the number of own tokens
        alone, whatever other rows there are.
        """
        place = struct.pack("<4q", seed, self.prompt, self.candidate, len(self.log_probs))
        digest = hashlib.blake2b(place, digest_size=8).digest()
        return (int.from_bytes(digest, "little") >> 11) / 2**53  # as many bits as a double has

    def write(self, token: int, log_prob: float, sampling: Sampling, ends: frozenset[int]) -> None:
        """Take an own token, and see whether it ends the answer."""
        self.tokens.append(token)
        self.own.append(True)
        self.log_probs.append(log_prob)
        if token in ends:
            self.finished = "eos"
        elif len(self.log_probs) == sampling.max_own_tokens or len(self.tokens) >= self.room:
            self.finished = "length"

    def insert(self, tokens: list[int]) -> None:
        """Take a tool's result; an answer into whose context it does not fit ends without it."""
        if len(self.tokens) + len(tokens) >= self.room:
            self.finished = "length"
            return
        self.tokens += tokens
        self.own += [False] * len(tokens)
        self.watched = len(self.tokens)
