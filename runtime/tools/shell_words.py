"""Splits a command line into words, as a shell would, without being one.

Quotes and backslashes work as in a shell; a pipe separates commands. Everything else that means
something to a shell (variables, substitution, redirection, lists, globs, braces, comments) is
refused where it stands unquoted, rather than taken for text: the model would not get what it meant.
"""

from dataclasses import dataclass, field

MOST_COMMANDS, MOST_WORDS = 8, 64

_MEANINGFUL = {
    "$": "variables and $(...)",
    "`": "backticks",
    ";": "lists of commands",
    "&": "&& and background commands",
    "<": "redirection",
    ">": "redirection (tee writes a file)",
    "(": "subshells",
    ")": "subshells",
    "{": "braces",
    "}": "braces",
    "*": "globs",
    "?": "globs",
    "[": "globs",
    "]": "globs",
    "\n": "several lines",
    "\r": "several lines",
}


class Refused(ValueError):
    """A command that is not run; the message says why, for the model to read."""


@dataclass
class _Reader:
    text: str
    at: int = 0
    word: list[str] | None = None  # None: between words
    commands: list[list[str]] = field(default_factory=lambda: [[]])

    def add(self, letters: str) -> None:
        if self.word is None:
            self.word = []
        self.word.append(letters)

    def end_word(self) -> None:
        if self.word is not None:
            self.commands[-1].append("".join(self.word))
        self.word = None
        if len(self.commands[-1]) > MOST_WORDS:
            raise Refused(f"a command has at most {MOST_WORDS} words")


def split(command: str) -> list[list[str]]:
    """The words of each command of a pipeline. Raises Refused for everything but a pipeline."""
    for letter in command:
        if not (letter.isprintable() or letter in " \t\n\r"):
            raise Refused(f"{letter!r} has no place in a command")
    reader = _Reader(command)
    while reader.at < len(command):
        _next(reader)
    reader.end_word()
    if len(reader.commands) > MOST_COMMANDS:
        raise Refused(f"a pipeline has at most {MOST_COMMANDS} commands")
    if not all(reader.commands):
        raise Refused("there is no command on one side of a pipe (||, |& and lists do not exist)")
    return reader.commands


def _next(reader: _Reader) -> None:
    letter = reader.text[reader.at]
    reader.at += 1
    if letter in " \t":
        reader.end_word()
    elif letter == "|":
        reader.end_word()
        reader.commands.append([])
    elif letter == "'":
        _quoted(reader)
    elif letter == '"':
        _double_quoted(reader)
    elif letter == "\\":
        reader.add(_escaped(reader))
    elif letter in _MEANINGFUL:
        raise Refused(f"there is no shell: no {_MEANINGFUL[letter]}; put {letter!r} in quotes")
    elif reader.word is None and letter in "~#":
        raise Refused(f"there is no shell: no {letter!r} at the start of a word; put it in quotes")
    else:
        reader.add(letter)


def _quoted(reader: _Reader) -> None:
    end = reader.text.find("'", reader.at)
    if end < 0:
        raise Refused("a ' is not closed")
    reader.add(reader.text[reader.at : end])
    reader.at = end + 1


def _double_quoted(reader: _Reader) -> None:
    reader.add("")
    while reader.at < len(reader.text):
        letter = reader.text[reader.at]
        reader.at += 1
        if letter == '"':
            return
        if letter in "$`":
            raise Refused(f"there is no shell: no {_MEANINGFUL[letter]}; use single quotes")
        if letter == "\\" and reader.text[reader.at : reader.at + 1] in ('"', "\\", "$", "`"):
            letter = _escaped(reader)
        reader.add(letter)
    raise Refused('a " is not closed')


def _escaped(reader: _Reader) -> str:
    if reader.at >= len(reader.text) or reader.text[reader.at] in "\n\r":
        raise Refused("nothing stands behind a backslash")
    reader.at += 1
    return reader.text[reader.at - 1]
