"""Small talk, from the package chatterbot-corpus: what is said first, and the first reply to it.

Its YAML files are read as data. Which of them, and which requests were left out by a reader of
this project and why, stands in small_talk.yaml.
"""

import re
from pathlib import Path

from registry.strict import strict_yaml
from stages.formats.conversations import Conversation
from stages.prepare.packages import package_folder
from stages.prepare.splits import Made, Rows, Wanted, digest, hold_out

DATA_SET = "small-talk"
CHOICE = Path(__file__).with_name("small_talk.yaml")
ASKS = set(
    "what who where when why which how do does did is are am was were can could will would have "
    "has may should".split()
)


def small_talk(wanted: Wanted, rows: Rows) -> Made:
    """Greetings, jokes and chat; of requests that repeat, the first."""
    del rows
    folder = package_folder("chatterbot_corpus", "chatterbot-corpus", DATA_SET)
    choice = strict_yaml(CHOICE)
    left_out = {words_of(said) for reasons in choice["left_out"].values() for said in reasons}
    told: dict[str, Conversation] = {}
    for topic in choice["topics"]:
        for said, reply in first_exchanges(folder / "data" / "english" / f"{topic}.yml"):
            key = words_of(said)
            if key not in left_out and words_of(reply) != key:
                told.setdefault(key, _conversation(topic, tidy(said, True), tidy(reply, False)))
    return hold_out(list(told.values()), wanted)


def first_exchanges(path: Path) -> list[tuple[str, str]]:
    """Give (what is said, the first reply) of each conversation of one file."""
    if not path.is_file():
        raise FileNotFoundError(
            f"data set '{DATA_SET}': {path} does not exist; install the version of "
            "chatterbot-corpus that constraints.txt names"
        )
    exchanges = strict_yaml(path)["conversations"]
    return [(str(lines[0]), str(lines[1])) for lines in exchanges if len(lines) > 1]


def words_of(text: str) -> str:
    """What a request says, whatever its case and punctuation."""
    return " ".join(re.findall(r"[\w']+", text.lower()))


def tidy(text: str, is_request: bool) -> str:
    """One line of sentences, each begun in upper case and ended by a mark."""
    line = " ".join(text.split()).strip("' ") or text
    if line.isupper() and len(line.split()) > 1:
        line = line.lower()
    line = re.sub(r"\bi\b(?!\.)", "I", re.sub(r"([.?])\1+$", r"\1", line))
    line = re.sub(r"(?:^|(?<=[.?!] ))[a-z]", lambda first: first.group().upper(), line)
    if line[-1].isalnum():
        first, *others = words_of(line).split()
        asks = is_request and first.removesuffix("'s") in ASKS and others[:1] != ["not"]
        line += "?" if asks else "."
    return line


def _conversation(topic: str, said: str, reply: str) -> Conversation:
    return Conversation(
        id=digest(words_of(said))[:16],
        capability="dialogue",
        segments=(("prompt", said), ("own", reply)),
        answer=None,
        facts={"topic": topic},
    )
