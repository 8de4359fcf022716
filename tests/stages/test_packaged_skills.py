"""Skills whose data comes inside packages: read as files, tidied, split, and missed by name."""

import struct
import subprocess
import sys
from pathlib import Path

import pytest

from registry.strict import BadEntry, build_record, strict_yaml
from stages.prepare.interface_texts import german_interface, plain_pairs, read_catalogue
from stages.prepare.packages import package_folder
from stages.prepare.skills import clean_conversations
from stages.prepare.small_talk import CHOICE, first_exchanges, small_talk, tidy, words_of
from stages.prepare.splits import Wanted
from stages.prepare.wordings import Wordings, read_wordings
from tests.tiny import REPOSITORY

ALL = Wanted(train=9999, heldout=9999, seed=0)
SOURCES = {"small-talk": small_talk, "german-interface": german_interface}

both = pytest.mark.parametrize("name", SOURCES)


@both
def test_a_tenth_is_held_out_and_nothing_is_on_both_sides(name: str) -> None:
    train, heldout = SOURCES[name](ALL, ())
    assert len(train) >= 180 and len(heldout) == (len(train) + len(heldout)) // 10
    assert {told.id for told in train}.isdisjoint(told.id for told in heldout)
    assert {words_of(told.prompt) for told in train}.isdisjoint(
        words_of(told.prompt) for told in heldout
    )
    _, dropped = clean_conversations(name, train, heldout, [])
    assert dropped == 0


@both
def test_the_same_seed_gives_the_same_and_another_one_another_split(name: str) -> None:
    assert SOURCES[name](ALL, ()) == SOURCES[name](ALL, ())
    other = SOURCES[name](Wanted(train=9999, heldout=9999, seed=1), ())
    assert {told.id for told in other[1]} != {told.id for told in SOURCES[name](ALL, ())[1]}
    few = SOURCES[name](Wanted(train=20, heldout=4, seed=0), ())
    assert (len(few[0]), len(few[1])) == (20, 4)


@both
def test_a_package_that_is_not_installed_is_named_with_what_to_do(name: str, monkeypatch) -> None:
    for module in ("django", "chatterbot_corpus"):
        monkeypatch.setitem(sys.modules, module, None)  # how Python marks what cannot be imported
    with pytest.raises(FileNotFoundError, match=f"'{name}' needs.*'offline'.*pip install --no-dep"):
        SOURCES[name](ALL, ())


def test_a_package_is_found_without_importing_it() -> None:
    code = (
        "import sys; from stages.prepare.packages import package_folder; "
        "assert (package_folder('django', 'django', 'german-interface') / 'conf').is_dir(); "
        "assert 'django' not in sys.modules"
    )  # in a process of its own: other tests' libraries look for django, too
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


# --- small talk ------------------------------------------------------------------------------


def test_small_talk_is_one_tidy_exchange_and_never_repeats_itself() -> None:
    train, heldout = small_talk(ALL, ())
    for told in train + heldout:
        assert [kind for kind, _ in told.segments] == ["prompt", "own"]
        for text in (told.prompt, told.reply):
            assert text == " ".join(text.split()) and not text[0].islower(), text
            assert not text[-1].isalnum(), text
    requests = [words_of(told.prompt) for told in train + heldout]
    assert len(set(requests)) == len(requests)
    assert {"hello", "tell me a joke", "what's up"} <= set(requests)


def test_everything_left_out_of_small_talk_is_in_its_package_and_stays_out() -> None:
    choice = strict_yaml(CHOICE)
    folder = package_folder("chatterbot_corpus", "chatterbot-corpus", "small-talk")
    files = [folder / "data/english" / f"{topic}.yml" for topic in choice["topics"]]
    there = {words_of(said) for path in files for said, _ in first_exchanges(path)}
    left_out = [words_of(said) for reason in choice["left_out"].values() for said in reason]
    assert set(left_out) <= there and len(set(left_out)) == len(left_out)
    train, heldout = small_talk(ALL, ())
    assert {words_of(told.prompt) for told in train + heldout}.isdisjoint(left_out)


@pytest.mark.parametrize(
    ("text", "is_request", "expected"),
    [
        ("do  you\n drink", True, "Do you drink?"),
        ("Do not worry", True, "Do not worry."),
        ("what's up", True, "What's up?"),
        ("I LOVE BASEBALL", True, "I love baseball."),
        ("yes. what about you..", False, "Yes. What about you."),
        ("i think i do", False, "I think I do."),
        ("who says??", False, "Who says?"),
        ("Hi!", True, "Hi!"),
    ],
)
def test_what_is_said_is_tidied(text: str, is_request: bool, expected: str) -> None:
    assert tidy(text, is_request) == expected


def test_a_topic_that_the_package_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="weather.yml.*constraints.txt"):
        first_exchanges(tmp_path / "weather.yml")


# --- German ----------------------------------------------------------------------------------


def test_translations_are_plain_and_differ_from_what_is_asked() -> None:
    train, heldout = german_interface(ALL, ())
    pairs = {told.prompt: told.reply for told in train + heldout}
    assert any("Enter a valid email address." in asked for asked in pairs)
    assert "Speichern" in pairs.values() or "Sichern" in pairs.values()
    for asked, german in pairs.items():
        assert german not in asked.splitlines() and german == german.strip()
        assert not any(mark in asked + german for mark in ("%(", "%s", "{", "<", "\x04"))


def test_german_is_also_asked_for_in_words_that_never_trained() -> None:
    train, heldout = german_interface(ALL, ())
    assert not any(told.facts["new_wording"] for told in train)
    assert 1 / 4 < sum(told.facts["new_wording"] for told in heldout) / len(heldout) < 3 / 4
    wordings = read_wordings("german-interface")
    assert 3 * len(wordings.heldout) >= len(wordings.heldout) + len(wordings.training)


def test_messages_that_make_no_sense_alone_are_left_out() -> None:
    pairs = [
        ("Save", "Sichern"), ("Save:", "Sichern:"), ("Sun", "So"), ("Text", "Text"), ("", "Kopf"),
        ("%(name)s is here", "%(name)s ist da"), ("a <b>link</b>", "ein <b>Link</b>"),
        ("month\x04May", "Mai"), ("one day\0days", "ein Tag\0Tage"), ("Empty", ""),
    ]  # fmt: skip
    assert plain_pairs(pairs) == [("Save", "Sichern")]


def catalogue(path: Path, messages: dict[str, str], magic: int = 0x950412DE) -> Path:
    """Write a compiled catalogue as GNU gettext's manual describes it."""
    texts = [text.encode() for text in [*messages, *messages.values()]]
    count, header = len(messages), 28
    body = header + 16 * count
    places = []
    for text in texts:
        places += [len(text), body]
        body += len(text) + 1
    start = struct.pack("<7I", magic, 0, count, header, header + 8 * count, 0, body)
    table = struct.pack(f"<{len(places)}I", *places)
    path.write_bytes(start + table + b"".join(text + b"\0" for text in texts))
    return path


def test_a_catalogue_is_read_as_gettext_wrote_it(tmp_path: Path) -> None:
    messages = {"Change": "Ändern", "Yes": "Ja"}
    path = catalogue(tmp_path / "some.mo", messages)
    assert read_catalogue(path) == list(messages.items())


def test_a_file_that_is_no_catalogue_is_refused(tmp_path: Path) -> None:
    path = catalogue(tmp_path / "some.mo", {"Yes": "Ja"}, magic=7)
    with pytest.raises(ValueError, match="some.mo begins with 0x7"):
        read_catalogue(path)


# --- wordings --------------------------------------------------------------------------------


def test_a_wording_of_both_lists_is_refused() -> None:
    with pytest.raises(BadEntry, match=r"share \['Say'\]"):
        build_record(Wordings, {"training": ["Say", "Tell"], "heldout": ["Say"]}, "wordings")
