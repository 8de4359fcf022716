"""Texts of user interfaces with their German translations, from the catalogues inside Django.

The compiled catalogues (.mo, the format of GNU gettext) are read as files; Django is not imported.
Left out: texts with placeholders or markup, those that need a context or have a plural, what is
the same in both languages, and what is too short to say what it means ("Sun" is Sunday).
"""

import re
import struct
from pathlib import Path

from stages.formats.conversations import Conversation
from stages.prepare.packages import package_folder
from stages.prepare.splits import Made, Rows, Wanted, digest, hold_out_by
from stages.prepare.wordings import Wordings, read_wordings

DATA_SET = "german-interface"
CATALOGUES = "**/locale/de/LC_MESSAGES/*.mo"
MAGIC = 0x950412DE  # of a little-endian catalogue
CONTEXT, PLURAL = "\x04", "\0"
NOT_PLAIN = re.compile(rf"[%{{<&|\n{CONTEXT}{PLURAL}]")
SHORTEST, LONGEST = 4, 200  # characters

Pair = tuple[str, str]  # English, German


def german_interface(wanted: Wanted, rows: Rows) -> Made:
    """Requests to translate; what is held out is so in whatever case or punctuation."""
    del rows
    folder = package_folder("django", "django", DATA_SET)
    pairs = [pair for path in sorted(folder.glob(CATALOGUES)) for pair in read_catalogue(path)]
    if not pairs:
        raise FileNotFoundError(
            f"data set '{DATA_SET}': {folder} holds no {CATALOGUES}; install django again"
        )
    train, heldout = hold_out_by(lambda pair: _said(pair[0]), plain_pairs(pairs), wanted)
    wordings = read_wordings(DATA_SET)
    return (
        [_told(pair, wordings, False, wanted.seed) for pair in train],
        [_told(pair, wordings, True, wanted.seed) for pair in heldout],
    )


def read_catalogue(path: Path) -> list[Pair]:
    """Give the messages of one compiled catalogue with their translations, in its order.

    Its header is seven 32-bit words: magic, revision, count, and where the tables of messages and
    of translations begin; a table has (length, offset) each. Raises ValueError for another file.
    """
    data = path.read_bytes()
    magic, _, count, *tables = struct.unpack_from("<5I", data)
    if magic != MAGIC:
        raise ValueError(f"{path} begins with {magic:#x}, a gettext catalogue with {MAGIC:#x}")
    columns = []
    for table in tables:
        places = struct.unpack_from(f"<{2 * count}I", data, table)
        spans = zip(places[::2], places[1::2], strict=True)
        columns.append([data[at : at + length].decode("utf-8") for length, at in spans])
    return list(zip(*columns, strict=True))


def plain_pairs(pairs: list[Pair]) -> list[Pair]:
    """Keep what makes sense on its own, each message once."""
    first: dict[str, Pair] = {}
    for english, german in ((message.strip(), text.strip()) for message, text in pairs):
        makes_sense = SHORTEST <= len(english) <= LONGEST and german and german != english
        if makes_sense and not NOT_PLAIN.search(english):
            first.setdefault(_said(english), (english, german))
    return list(first.values())


def _said(text: str) -> str:
    """A message's words alone, so that "Username:" is no other message than "username"."""
    return " ".join(re.findall(r"\w+", text.lower()))


def _told(pair: Pair, wordings: Wordings, heldout: bool, seed: int) -> Conversation:
    english, german = pair
    wording, is_new = wordings.choose(_said(english), heldout, seed)
    return Conversation(
        id=digest(english)[:16],
        capability="translation",
        segments=(("prompt", wording.format(text=english)), ("own", german)),
        answer=None,
        facts={"words": len(english.split()), "new_wording": is_new},
    )
