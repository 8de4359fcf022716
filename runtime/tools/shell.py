"""The tool `bash`: a pipeline of allow-listed commands, checked word by word; there is no shell.

    text -> words -> per command: a known name, known options, operands of the right kind -> argv

Names become absolute paths of installed programs. Options are written out before `--`, operands
behind it, so that none is taken for the other. A file is named by a relative path below the scratch
folder. What of this were wrong, the sandbox would still hold.
"""

import re
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path, PurePosixPath

from runtime.tools.shell_commands import COMMANDS, FILES, FIND_TESTS, KNOWN, NUMBERS, Command
from runtime.tools.shell_words import Refused, split

FOLDERS = (Path("/usr/bin"), Path("/bin"))
LONGEST_PATH = 200

_NUMBER = re.compile(r"[+-]?[0-9]{1,18}[kKMG]?")
_DECIMAL = re.compile(r"[+-]?(?:[0-9]{1,18}(?:\.[0-9]{0,9})?|\.[0-9]{1,9})")


def pipeline(command: str) -> list[list[str]]:
    """The argument lists of a command line's pipeline. Raises Refused with what is not allowed."""
    return [_checked(words) for words in split(command)]


def is_failure(arguments: list[str], status: int) -> bool:
    """Whether an exit status means that a command failed: grep's 1 means that nothing was found."""
    known = COMMANDS.get(PurePosixPath(arguments[0]).name, Command())
    return status > 1 if known.quiet_failure else status != 0


@cache
def program(name: str) -> Path:
    """Where a command lies. Raises Refused where it is not installed."""
    for folder in FOLDERS:
        if (folder / name).is_file():
            return folder / name
    raise Refused(f"{name} is not installed here")


def programs() -> list[Path]:
    """The installed ones of the known commands."""
    found = []
    for name in KNOWN:
        with suppress(Refused):
            found.append(program(name))
    return found


def path_inside(name: str) -> str:
    """A path that stays below the scratch folder. Raises Refused for any other."""
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or len(name) > LONGEST_PATH:
        raise Refused(f"{name[:60]!r}: files lie below the scratch folder, named by relative paths")
    return str(path)


def _checked(words: list[str]) -> list[str]:
    name, given = words[0], words[1:]
    if name == "find":
        return _find(given)
    if name not in COMMANDS:
        raise Refused(f"no command {name[:40]!r}; there are {', '.join(KNOWN)}")
    known = COMMANDS[name]
    options, operands = _separated(name, known, given)
    if not known.fewest <= len(operands) <= known.most:
        raise Refused(f"{name} takes {known.fewest} to {known.most} operands")
    behind = ["--"] if known.dashes and operands else []
    return [
        str(program(name)),
        *known.forced,
        *options,
        *behind,
        *_operands(known, options, operands),
    ]


def _separated(name: str, known: Command, given: list[str]) -> tuple[list[str], list[str]]:
    """Options (each checked) and operands of a command."""
    options: list[str] = []
    operands: list[str] = []
    rest = iter(given)
    for word in rest:
        negative = known.operands == NUMBERS and _DECIMAL.fullmatch(word)
        if word == "--":
            operands += rest
        elif word == "-" or not word.startswith("-") or negative:
            operands.append(word)
        elif known.operands not in (FILES, NUMBERS) and not known.flags + known.valued:
            operands.append(word)  # printf, expr: a dash is text
        elif known.operands == "text" and not known.dashes and operands:
            operands.append(word)  # echo: options come first
        elif word.startswith("--"):
            options.append(_long(name, known, word))
        elif known.short_count and word[1:].isdigit():
            options += ["-n", word[1:]]
        else:
            options += _short(name, known, word[1:], rest)
    return options, operands


def _long(name: str, known: Command, word: str) -> str:
    option, equals, _ = word.partition("=")
    if option + equals not in known.long:
        raise Refused(f"{name} has no option {option[:40]!r} here")
    return word


def _short(name: str, known: Command, letters: str, rest: Iterator[str]) -> list[str]:
    """A word of one-letter options; the value of the last may be the next word."""
    found = []
    for at, letter in enumerate(letters):
        if letter in known.flags:
            found.append(f"-{letter}")
        elif letter in known.valued + known.numbered:
            value = letters[at + 1 :] or next(rest, None)
            if value is None:
                raise Refused(f"{name}: -{letter} needs a value")
            if letter in known.numbered and not _NUMBER.fullmatch(value):
                raise Refused(f"{name}: -{letter} needs a number, not {value[:40]!r}")
            return [*found, f"-{letter}", value]
        else:
            raise Refused(f"{name} has no option '-{letter}' here; it has {_listed(known)}")
    return found


def _listed(known: Command) -> str:
    letters = known.flags + known.valued + known.numbered
    return ", ".join([*(f"-{letter}" for letter in letters), *known.long]) or "none"


def _operands(known: Command, options: list[str], operands: list[str]) -> list[str]:
    if known.operands == NUMBERS:
        for word in operands:
            if not _DECIMAL.fullmatch(word):
                raise Refused(f"{word[:40]!r} is no number")
        return operands
    if known.operands != FILES:
        return operands
    has_pattern = known.pattern and not {f"-{one}" for one in known.pattern_options} & set(options)
    if has_pattern and not operands:
        raise Refused("there is no pattern")
    first = 1 if has_pattern else 0
    return operands[:first] + [
        word if word == "-" else path_inside(word) for word in operands[first:]
    ]


def _find(given: list[str]) -> list[str]:
    """find: folders, then tests of FIND_TESTS; nothing that acts."""
    folders: list[str] = []
    rest = iter(given)
    tests: list[str] = []
    for word in rest:
        if not word.startswith("-") and not tests:
            folders.append(path_inside(word))  # no dash at its start: not taken for a test
        elif word not in FIND_TESTS:
            raise Refused(f"find has no {word[:40]!r} here; it has {', '.join(FIND_TESTS)}")
        else:
            tests.append(word)
            if FIND_TESTS[word]:
                value = next(rest, "")
                if not value or (FIND_TESTS[word] == "number" and not value.isdigit()):
                    raise Refused(f"find: {word} needs a {FIND_TESTS[word]}")
                tests.append(value)
    return [str(program("find")), *(folders or ["."]), *tests]
