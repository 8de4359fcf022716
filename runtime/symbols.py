"""Dynamic symbols: short names that a model gives to long phrases, and what they save.

    <define symbol=X: the arithmetic mean of the two largest values> ... X ... X

Nano-Cog's grammar. From its definition on, a symbol stands for its definition wherever it occurs
as a word of its own; whoever reads the answer gets it expanded. A context may spend 50 tokens on
definitions. What a symbol saves is counted honestly: each use saves the tokens of the definition
without those of the symbol, and the statement that defines it costs all of its tokens, so that a
symbol which is used once costs more than it saves.

Text of a model is untrusted. Names are capital letters and digits, so that no ordinary word turns
into a symbol; a use right behind the same symbol counts once; a definition may use symbols, but
never in a circle, and what it expands to is bounded. What is wrong is reported, never raised.
Not covered: whether a definition says something sensible. That is for the reward of the answer.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

BUDGET_TOKENS = 50  # of all definitions in a context
LONGEST_MEANING = 2_000  # characters that one symbol may expand to

CountTokens = Callable[[str], int]

_STATEMENT = re.compile(r"<define\b[^<>\n]*>?")
_WELL_FORMED = re.compile(r"<define symbol=([A-Z][A-Z0-9]{0,7}):([^<>\n]*)>")
_WORD = re.compile(r"(?<![A-Za-z0-9_])[A-Z][A-Z0-9]{0,7}(?![A-Za-z0-9_])")


@dataclass(frozen=True)
class Symbol:
    """A symbol in force. `meaning` is its definition with earlier symbols expanded."""

    name: str
    definition: str
    meaning: str


@dataclass(frozen=True)
class Fault:
    """A statement that defines nothing: where it stands, and what is wrong with it."""

    position: int
    text: str
    error: str


@dataclass(frozen=True)
class Compression:
    """What symbols save in a text, in tokens. uses: counted ones, of all symbols."""

    uses: int
    saved_tokens: int
    cost_tokens: int

    @property
    def net_tokens(self) -> int:
        """Saved less spent: negative where the symbols do not pay."""
        return self.saved_tokens - self.cost_tokens


@dataclass(frozen=True)
class _Piece:
    """A part of a text. symbol: the one that is used; statement: a definition, good or bad."""

    text: str
    symbol: Symbol | None = None
    statement: bool = False


@dataclass(frozen=True)
class Symbols:
    """A text that was read for symbols."""

    in_force: dict[str, Symbol]
    faults: tuple[Fault, ...]
    _pieces: tuple[_Piece, ...]

    def expanded(self) -> str:
        """The text for its reader: without statements, with meanings in the place of symbols.

        At most LONGEST_MEANING characters stand in the place of one use.
        """
        parts = [
            piece.symbol.meaning if piece.symbol else piece.text
            for piece in self._pieces
            if not piece.statement
        ]
        return "".join(parts).strip()

    def compression(self, count_tokens: CountTokens) -> Compression:
        """Count what the symbols save. Statements that define nothing cost their tokens too."""
        saved = uses = cost = 0
        before: Symbol | None = None
        for piece in self._pieces:
            if piece.statement:
                cost += count_tokens(piece.text)
            elif piece.symbol and piece.symbol != before:
                saved += count_tokens(piece.symbol.meaning) - count_tokens(piece.symbol.name)
                uses += 1
            if piece.symbol or re.search(r"\w", piece.text):
                before = piece.symbol
        return Compression(uses, saved, cost)


def read_symbols(text: str, count_tokens: CountTokens, budget: int = BUDGET_TOKENS) -> Symbols:
    """Read the definitions of a text and where they are used.

    budget: tokens that all statements may take; those that go beyond define nothing. Takes time
    linear in the text.
    """
    reader = _Reader(count_tokens, budget)
    at = 0
    for match in _STATEMENT.finditer(text):
        reader.plain(text[at : match.start()])
        reader.statement(match.start(), match.group())
        at = match.end()
    reader.plain(text[at:])
    return Symbols(reader.in_force, tuple(reader.faults), tuple(reader.pieces))


class _Reader:
    """Goes through a text from its start; `in_force` is what has been defined so far."""

    def __init__(self, count_tokens: CountTokens, budget: int) -> None:
        self.count_tokens, self.left = count_tokens, budget
        self.in_force: dict[str, Symbol] = {}
        self.faults: list[Fault] = []
        self.pieces: list[_Piece] = []
        self.mentioned: dict[str, set[str]] = {}  # symbol -> words of its definition

    def plain(self, text: str) -> None:
        """Take in text between statements."""
        at = 0
        for match in _WORD.finditer(text):
            symbol = self.in_force.get(match.group())
            if symbol:
                self.pieces += [_Piece(text[at : match.start()]), _Piece(symbol.name, symbol)]
                at = match.end()
        self.pieces.append(_Piece(text[at:]))

    def statement(self, position: int, text: str) -> None:
        """Take in a statement: a symbol comes into force, or a fault is noted."""
        self.pieces.append(_Piece(text, statement=True))
        match = _WELL_FORMED.fullmatch(text)
        name, definition = (part.strip() for part in match.groups()) if match else ("", "")
        error = self._error(text, name, definition) if definition else _what_is_malformed(text)
        if error:
            self.faults.append(Fault(position, text, error))
            return
        self.left -= self.count_tokens(text)
        self.mentioned[name] = set(_WORD.findall(definition))
        self.in_force[name] = Symbol(name, definition, self._meaning(definition))

    def _error(self, text: str, name: str, definition: str) -> str | None:
        cost = self.count_tokens(text)
        if name in self.in_force:
            return f"{name} is defined already; a symbol keeps its meaning"
        if name in self._reachable(set(_WORD.findall(definition))):
            return f"{name} is defined by itself; say it in other words"
        if cost > self.left:
            return f"takes {cost} tokens of the {self.left} left for definitions"
        if len(self._meaning(definition)) > LONGEST_MEANING:
            return f"expands to more than {LONGEST_MEANING} characters"
        return None

    def _reachable(self, words: set[str]) -> set[str]:
        """The words of a definition, those of the symbols among them, and so on."""
        seen: set[str] = set()
        while words:
            seen |= words
            words = set().union(*(self.mentioned.get(word, set()) for word in words)) - seen
        return seen

    def _meaning(self, definition: str) -> str:
        """A definition with symbols in force expanded; theirs are already, so once is enough."""

        def meaning_of(match: re.Match[str]) -> str:
            symbol = self.in_force.get(match.group())
            return symbol.meaning if symbol else match.group()

        return _WORD.sub(meaning_of, definition)


def _what_is_malformed(text: str) -> str:
    if not text.endswith(">"):
        return "is not closed; end it with '>' on the same line"
    match = re.match(r"<define symbol=([^:>]*)(:?)", text)
    if not match or not match.group(2):
        return "is not of the form <define symbol=X: definition>"
    if not re.fullmatch(r"[A-Z][A-Z0-9]{0,7}", match.group(1)):
        return (
            f"{match.group(1)[:20]!r} is no name; use one to eight of A-Z and 0-9, a letter first"
        )
    return "has no definition behind the colon"
