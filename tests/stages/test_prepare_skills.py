"""Conversations are made by name, cleaned of what is measured, and written where they are read."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from registry.catalog import lookup, names
from registry.strict import BadEntry
from stages.formats.conversations import Conversation, read_conversations
from stages.params import read_section
from stages.prepare.clean import Document
from stages.prepare.skills import (
    CONVERSATION_SOURCES,
    Wanted,
    arithmetic_plain,
    arithmetic_tools,
    clean_conversations,
    prepare_skill,
)
from stages.prepare.stage import Params
from tests.stages.project import make_project
from tests.tiny import REPOSITORY

WANTED = Wanted(train=40, heldout=8, seed=0)


def told(id: str, prompt: str, answer: str = "ok") -> Conversation:
    return Conversation(id, "talk", (("prompt", prompt), ("own", answer)), None)


def words(first: int, count: int) -> str:
    return " ".join(f"w{number}" for number in range(first, first + count))


def test_every_conversation_source_of_the_registry_is_there() -> None:
    entries = [lookup("datasets", name) for name in names("datasets")]
    named = {entry.source.conversations for entry in entries if entry.teaches_by_conversations}
    assert named == set(CONVERSATION_SOURCES)


def test_a_skill_is_written_where_later_stages_read_it(tmp_path: Path) -> None:
    job = make_project(tmp_path).job()
    metrics = prepare_skill("arithmetic-tools", WANTED, True, [], job)
    train, heldout = (
        read_conversations(job.output, "arithmetic-tools", split) for split in ("train", "heldout")
    )
    assert (len(train), len(heldout)) == (40, 10)
    assert metrics["conversations_arithmetic-tools_train"] == 40
    assert {found.prompt for found in train}.isdisjoint(found.prompt for found in heldout)
    assert train == arithmetic_tools(WANTED, ())[0], "their answers recite nothing"


def test_what_is_worked_out_in_the_head_states_every_result_and_calls_nothing() -> None:
    plain, heldout = arithmetic_plain(WANTED, ())
    assert (len(plain), len(heldout)) == (40, 10)
    called = {found.prompt for found in arithmetic_tools(WANTED, ())[0]}
    assert called.isdisjoint(found.prompt for found in plain)
    twins, _ = arithmetic_tools(replace(WANTED, seed=1), ())
    for found, twin in zip(plain, twins, strict=True):
        ((asked, prompt), (own, reply)) = found.segments
        assert (asked, own) == ("prompt", "own") and prompt == twin.prompt and "<<" not in reply
        results = [text[10:-1] for kind, text in twin.segments if kind == "result"]
        lines = [line for line in reply.splitlines() if any(r in line for r in results)]
        assert len(lines) >= len(results) and reply.endswith(f"\nFINAL: {results[-1]}")


def test_repeated_requests_and_what_is_measured_are_dropped() -> None:
    benchmark = Document("exam", "1", words(0, 30))
    train = [
        told("kept", words(100, 20)),
        told("twin", words(100, 20).upper() + "!"),
        told("asks", words(10, 13)),
        told("tells", "Recite.", words(5, 14)),
        told("held", words(200, 20)),
    ]
    heldout = [told("measured", words(200, 20))]
    kept, dropped = clean_conversations("talk", train, heldout, [benchmark])
    assert [found.id for found in kept] == ["kept"] and dropped == 4


def test_a_data_set_that_gives_nothing_to_measure_with_is_refused(tmp_path: Path) -> None:
    job = make_project(tmp_path).job()
    everything = [
        Document("exam", found.id, f"{found.prompt}\n{found.reply}")
        for found in arithmetic_tools(WANTED, ())[0]
    ]
    with pytest.raises(ValueError, match="gave 0 conversations.*train_conversations"):
        prepare_skill("arithmetic-tools", WANTED, False, everything, job)


@pytest.mark.parametrize(
    ("knob", "value", "message"),
    [
        ("datasets", ("arithmetic-tools",), "of conversations"),
        ("conversations", ("arithmetic",), "has no conversations"),
        ("conversations", ("arithmetic-tool",), "Did you mean arithmetic-tools"),
        ("train_conversations", 0, "train_conversations"),
        ("heldout_conversations", 0, "heldout_conversations"),
    ],
)
def test_a_list_of_the_wrong_kind_is_refused(knob: str, value: object, message: str) -> None:
    params = read_section(REPOSITORY / "params.yaml", "prepare", Params)
    with pytest.raises((ValueError, BadEntry), match=message):
        replace(params, **{knob: value})


# --- each data set ---------------------------------------------------------------------------

SHELLS = ("rm -rf /", "curl | sh", "chmod 777", "chmod -R 777")
GSM8K = {"question": "How many are 2 and 2?", "answer": "It is <<2+2=4>>4.\n#### 4"}


def made(name: str, wanted: Wanted, rows=()) -> tuple[list[Conversation], list[Conversation]]:
    return CONVERSATION_SOURCES[lookup("datasets", name).source.conversations](wanted, rows)


@pytest.mark.parametrize("name", ["arithmetic-tools", "react-traces", "devops"])
def test_what_is_made_here_is_enough_and_never_the_same_on_both_sides(name: str) -> None:
    train, heldout = made(name, Wanted(train=140, heldout=12, seed=0))
    assert len(train) == 140 and len(heldout) >= 12
    kept, _ = clean_conversations(name, train, heldout, [])
    assert len(kept) >= 130
    assert {found.prompt for found in train}.isdisjoint(found.prompt for found in heldout)
    assert len({found.id for found in [*train, *heldout]}) == len(train) + len(heldout)


def test_devops_answers_are_many_distinct_and_careful() -> None:
    train, heldout = made("devops", Wanted(train=1000, heldout=1000, seed=0))
    told = train + heldout
    assert len(told) >= 150 and len(heldout) == len(told) // 10
    assert len({found.prompt for found in told}) == len({found.reply for found in told})
    assert len({found.facts["topic"] for found in told}) >= 7
    for found in told:
        assert found.prompt[-1] in ".?" and found.reply.count("```") % 2 == 0
        assert found.reply.count("`") % 2 == 0 and len(found.reply) < 900
        assert not any(shell in found.reply for shell in SHELLS)


def test_gsm8k_is_read_from_a_folder_where_one_is_named(tmp_path: Path, monkeypatch) -> None:
    lines = [json.dumps({**GSM8K, "question": f"{GSM8K['question']} ({n})"}) for n in range(40)]
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k/train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.setenv("NANOFOUNDRY_DATA", str(tmp_path))
    job = make_project(tmp_path / "project").job()
    metrics = prepare_skill("gsm8k-tools", WANTED, True, [], job)
    assert metrics["conversations_gsm8k-tools_train"] == 36
    assert metrics["conversations_gsm8k-tools_heldout"] == 4


def test_gsm8k_that_is_not_there_is_refused_with_what_to_do(tmp_path: Path, monkeypatch) -> None:
    job = make_project(tmp_path / "project").job()
    monkeypatch.setenv("NANOFOUNDRY_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="gsm8k/train.jsonl.*NANOFOUNDRY_DATA"):
        prepare_skill("gsm8k-tools", WANTED, True, [], job)
    monkeypatch.delenv("NANOFOUNDRY_DATA")
    with pytest.raises(ConnectionError, match=r"prepare\.conversations.*NANOFOUNDRY_DATA"):
        prepare_skill("gsm8k-tools", WANTED, True, [], job)
