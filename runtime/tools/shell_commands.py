"""The commands that `bash` knows, and of each the options and the operands that it may be given.

None of them starts another program, and none reads a file that is not an operand. What is left out
on purpose, such as `sort -o`, `uniq IN OUT`, `sed w`, `grep -f`, `find -exec`, `awk` and `xargs`,
would write elsewhere or run something.
"""

from dataclasses import dataclass

FILES, TEXT, NUMBERS = "files", "text", "numbers"


@dataclass(frozen=True)
class Command:
    """What a command may be given.

    operands: what all of them are. flags: one-letter options without a value. valued, numbered:
    those with a text or a number. long: long options, with `=` where a value follows. pattern: the
    first operand is text, unless one of `pattern_options` stands for it. fewest, most: operands.
    forced: arguments that it is always given. dashes: whether `--` ends its options. short_count:
    `-5` is an option. quiet_failure: exit status 1 is an answer, no failure.
    """

    operands: str = FILES
    flags: str = ""
    valued: str = ""
    numbered: str = ""
    long: tuple[str, ...] = ()
    pattern: bool = False
    pattern_options: str = ""
    fewest: int = 0
    most: int = 64
    forced: tuple[str, ...] = ()
    dashes: bool = True
    short_count: bool = False
    quiet_failure: bool = False


COMMANDS: dict[str, Command] = {
    # text in, text out
    "cat": Command(flags="nbsETvA"),
    "head": Command(flags="qv", numbered="nc", short_count=True),
    "tail": Command(flags="qv", numbered="nc", short_count=True),
    "wc": Command(flags="lwcmL"),
    "sort": Command(flags="nrufbghVcdisz", valued="kt", forced=("--parallel=1",)),
    "uniq": Command(flags="cdui", numbered="fsw", most=1),
    "cut": Command(flags="sz", valued="dfcb", long=("--complement", "--output-delimiter=")),
    "tr": Command(TEXT, flags="dscCt", fewest=1, most=2),
    "grep": Command(
        flags="ivcnowxEFlLhHqsar",
        valued="e",
        numbered="mABC",
        pattern=True,
        pattern_options="e",
        quiet_failure=True,
    ),
    "sed": Command(
        flags="nEr", valued="e", pattern=True, pattern_options="e", forced=("--sandbox",)
    ),
    "nl": Command(valued="bns", numbered="wvi"),
    "rev": Command(),
    "tac": Command(flags="b", valued="s"),
    "fold": Command(flags="sb", numbered="w"),
    "fmt": Command(flags="su", numbered="w"),
    "paste": Command(flags="s", valued="d"),
    "join": Command(flags="i", valued="te", numbered="12av", fewest=2, most=2),
    "comm": Command(flags="123", fewest=2, most=2),
    "diff": Command(flags="uqiwbB", fewest=2, most=2, quiet_failure=True),
    "expand": Command(flags="i", numbered="t"),
    "unexpand": Command(flags="a", numbered="t"),
    "od": Command(flags="cbx", valued="At", numbered="Njw"),
    "base64": Command(flags="di", numbered="w", most=1),
    "md5sum": Command(),
    "sha1sum": Command(),
    "sha256sum": Command(),
    "cksum": Command(),
    "numfmt": Command(
        TEXT, valued="d", long=("--to=", "--from=", "--grouping", "--field=", "--round=")
    ),
    # text from nothing
    "echo": Command(TEXT, flags="neE", dashes=False),
    "printf": Command(TEXT, fewest=1),
    "seq": Command(NUMBERS, flags="w", valued="s", fewest=1, most=3),
    "yes": Command(TEXT),
    "true": Command(TEXT, dashes=False),
    "false": Command(TEXT, dashes=False, quiet_failure=True),
    # calculation
    "expr": Command(TEXT, fewest=1, quiet_failure=True),
    "bc": Command(TEXT, flags="lq", most=0, dashes=False),
    "factor": Command(NUMBERS),
    # names and files in the scratch folder
    "basename": Command(TEXT, flags="a", valued="s", fewest=1),
    "dirname": Command(TEXT, fewest=1),
    "ls": Command(flags="1aArRpFd"),
    "tee": Command(flags="a"),
    "mkdir": Command(flags="p", fewest=1),
    "touch": Command(fewest=1),
    "cp": Command(flags="r", fewest=2),
    "mv": Command(fewest=2),
    "rm": Command(flags="rf", fewest=1),
    "rmdir": Command(fewest=1),
}

FIND_TESTS: dict[str, str] = {  # of `find`, with the kind of value
    "-name": "text",
    "-iname": "text",
    "-type": "text",
    "-maxdepth": "number",
    "-mindepth": "number",
    "-size": "text",
    "-empty": "",
    "-not": "",
}
KNOWN = sorted([*COMMANDS, "find"])
