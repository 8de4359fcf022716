"""Scan files of version 2, cut and damaged: never a wrong number, never another error."""

import json
import random
import struct
from pathlib import Path
from zlib import crc32

import pytest

from stages.formats.mscan.reader import open_scan
from stages.formats.mscan.scan import BadScan, Scan
from stages.formats.mscan.sections import SECTION_HEADER, write_section
from stages.formats.mscan.writer import ScanWriter
from tests.stages.scans import BLOCKS, TEXTS, assert_begins, harm, put, write_scan

HARMED = 1000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.mscan"


@pytest.fixture
def content(path: Path) -> bytes:
    return write_scan(path)


@pytest.fixture
def whole(tmp_path: Path) -> Scan:
    write_scan(tmp_path / "whole.mscan")
    return open_scan(tmp_path / "whole.mscan")


def ends(content: bytes) -> list[int]:
    """Where each section ends: blocks, sequences, footer."""
    found, at = [], 64
    while content[at : at + 4] == b"MSEC":
        at += 64 + struct.unpack_from("<Q", content, at + 8)[0]
        found.append(at)
    return found


def signed(content: bytes, at: int, **changes: int) -> bytes:
    """A file whose section header at a byte says something else, with a right checksum."""
    names = ("magic", "kind", "size", "text_size", "text_crc", "numbers_crc", "crc")
    fields = dict(zip(names, SECTION_HEADER.unpack_from(content, at), strict=True)) | changes
    header = SECTION_HEADER.pack(*fields.values())[:-4]
    header += struct.pack("<I", crc32(header))
    return content[:at] + header + content[at + len(header) :]


# --- cut -------------------------------------------------------------------------------------


def test_a_file_cut_at_any_byte_opens_to_the_whole_sequences_before(
    path: Path, content: bytes, whole: Scan
) -> None:
    blocks, *sequences, _ = ends(content)
    for cut in range(len(content)):
        put(path, content[:cut])
        if cut < blocks:
            with pytest.raises(BadScan, match=f"torn: .*{cut}|file is empty"):
                open_scan(path)
            continue
        scan = open_scan(path)
        there = sum(end <= cut for end in sequences)
        assert assert_begins(scan, whole) == len(scan.sequences) == there
        assert not scan.complete
        assert f"{cut}" in scan.problem and f"{there} whole sequences before it" in scan.problem


def test_a_file_cut_at_any_byte_is_finished_to_the_same_bits(
    path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.fsync", lambda handle: None)  # 2,000 times, it is most of the test
    blocks, *_ = ends(content)
    for cut in range(blocks, len(content)):
        put(path, content[:cut])
        with ScanWriter.resume(path) as writer:
            for text in TEXTS[writer.count :]:
                writer.add(**vars(text))
        assert path.read_bytes() == content


def test_a_torn_end_is_dropped_though_nothing_is_added(path: Path, content: bytes) -> None:
    put(path, content[: ends(content)[3] - 1])
    with ScanWriter.resume(path) as writer:
        assert writer.count == 2
    assert path.read_bytes() == write_scan(path.with_name("b.mscan"), TEXTS[:2])


def test_a_file_cut_before_its_first_sequence_cannot_be_added_to(
    path: Path, content: bytes
) -> None:
    for cut in (0, 1, 7, 63, 64, 100, ends(content)[0] - 1):
        put(path, content[:cut])
        with pytest.raises(BadScan, match=f"{path}"):
            ScanWriter.resume(path)
        assert path.read_bytes() == content[:cut]


# --- what is no scan -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("begin", "told"),
    [
        (b"PK\x03\x04", r"not a scan file: it begins with b'PK"),
        (b"MSCAN\x03\x00", "a scan file of version 3; only 1 and 2 are read"),
        (b"MSCAN\x02\x00\x01", "the file header is damaged"),
    ],
)
def test_other_files_are_refused(path: Path, content: bytes, begin: bytes, told: str) -> None:
    put(path, begin + content[len(begin) :])
    with pytest.raises(BadScan, match=f"a.mscan: {told}"):
        open_scan(path)


# --- damaged ---------------------------------------------------------------------------------


def test_a_damaged_section_of_the_blocks_is_refused(path: Path, content: bytes) -> None:
    for at in range(64, ends(content)[0]):
        put(path, content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        with pytest.raises(BadScan, match="section at byte 64 is damaged"):
            open_scan(path)


def test_a_damaged_sequence_ends_the_scan_and_nothing_is_dropped(
    path: Path, content: bytes, whole: Scan
) -> None:
    second = ends(content)[1]
    for at in (second, second + 9, second + 40, second + 70):
        harmed = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
        put(path, harmed)
        scan = open_scan(path)
        assert assert_begins(scan, whole) == len(scan.sequences) == 1
        assert f"section at byte {second} is damaged" in scan.problem
        with pytest.raises(BadScan, match="damaged, not just torn, so nothing is dropped"):
            ScanWriter.resume(path)
        assert path.read_bytes() == harmed


def test_a_footer_that_contradicts_the_sections_is_not_believed(
    path: Path, content: bytes, whole: Scan
) -> None:
    first, second, third, last, _ = ends(content)
    without_one = content[:second] + content[third:]  # moved as a whole: all checksums are right
    put(path, without_one)
    scan = open_scan(path)
    assert [sequence.id for sequence in scan.sequences] == [0, 2]
    assert not scan.complete
    assert f"footer at byte {last - third + second} contradicts the sections" in scan.problem
    with path.open("wb") as stream:
        stream.write(content[:last])
        write_section(stream, b"FOOT", {"sections": "none"}, [])
    scan = open_scan(path)
    assert assert_begins(scan, whole) == 3 and "contradicts" in scan.problem
    with ScanWriter.resume(path):
        pass
    assert path.read_bytes() == content


@pytest.mark.parametrize("more", [b"\0", b"x" * 5000])
def test_what_follows_the_end_is_told(path: Path, content: bytes, whole: Scan, more: bytes) -> None:
    put(path, content + more)
    scan = open_scan(path)
    assert assert_begins(scan, whole) == 3
    assert f"at byte {len(content) - 16} there is something else" in scan.problem


# --- lies with right checksums ---------------------------------------------------------------


@pytest.mark.parametrize("size", [2**64 - 64, 2**60, 2**33, 1 << 20])
def test_a_lying_length_is_a_torn_section(
    path: Path, content: bytes, whole: Scan, size: int
) -> None:
    for text_size in (64, size):
        put(path, signed(content, ends(content)[0], size=size, text_size=text_size))
        scan = open_scan(path)
        assert scan.sequences == [] and "cut off" in scan.problem
        put(path, signed(content, 64, size=size, text_size=text_size))
        with pytest.raises(BadScan, match=f"cut off at byte {len(content)}"):
            open_scan(path)


@pytest.mark.parametrize("changes", [{"size": 0}, {"size": 65}, {"text_size": 2**60}])
def test_lengths_that_contradict_each_other_are_a_damage(
    path: Path, content: bytes, changes: dict
) -> None:
    put(path, signed(content, ends(content)[0], **changes))
    scan = open_scan(path)
    assert scan.sequences == [] and "lengths that cannot be" in scan.problem


@pytest.mark.parametrize("kind", [b"BLKS", b"NEWS"])
def test_a_section_of_an_unknown_kind_ends_the_scan(
    path: Path, content: bytes, kind: bytes
) -> None:
    put(path, signed(content, ends(content)[1], kind=kind))
    scan = open_scan(path)
    assert len(scan.sequences) == 1 and f"of unknown kind {kind!r}" in scan.problem


@pytest.mark.parametrize(
    "text",
    [
        b"[]",
        b"3",
        b"{",
        b"\xff",
        b"[" * 100_000,
        b'{"id": 0, "source": "a"}',
        b'{"id": "0", "source": "a", "tokens": ["a"]}',
        b'{"id": 0, "source": "a", "tokens": 1152921504606846976}',
        b'{"id": 0, "source": "a", "tokens": [1]}',
        b'{"id": 0, "source": "a", "tokens": ["a"]}',  # without numbers
    ],
)
def test_json_that_says_something_else_ends_the_scan(
    path: Path, content: bytes, text: bytes
) -> None:
    text = text.ljust(-(-len(text) // 64) * 64)
    sizes = {"size": len(text), "text_size": len(text), "text_crc": crc32(text)}
    at = ends(content)[0]
    put(path, signed(content, at, **sizes)[: at + 64] + text)
    scan = open_scan(path)
    assert scan.sequences == [] and f"section at byte {at} " in scan.problem


@pytest.mark.parametrize(
    "change",
    [
        {"model": 3},
        {"about": []},
        {"blocks": []},
        {"blocks": 3},
        {"blocks": [3]},
        {"blocks": [{"id": 1}]},
        {"blocks": [vars(BLOCKS[0])] * 2},
        {"blocks": [vars(BLOCKS[0]) | {"id": "7"}]},
        {"blocks": [vars(BLOCKS[0]) | {"more": 1}]},
    ],
)
def test_a_section_of_blocks_that_says_something_else_is_refused(
    path: Path, content: bytes, change: dict
) -> None:
    fields = json.loads(content[128 : ends(content)[0]])
    with path.open("wb") as stream:
        stream.write(content[:64])
        write_section(stream, b"BLKS", fields | change, [])
    with pytest.raises(BadScan, match="section of the blocks does not say what it must"):
        open_scan(path)


# --- at random -------------------------------------------------------------------------------


def test_a_harmed_file_gives_an_error_or_nothing_but_what_was_written(
    path: Path, content: bytes, whole: Scan
) -> None:
    opened, intact, refused = 0, 0, 0
    for seed in range(HARMED):
        put(path, harm(content, random.Random(seed)))
        try:
            scan = open_scan(path)
        except BadScan as error:
            assert str(error).startswith(str(path))
            refused += 1
            continue
        opened += 1
        intact += assert_begins(scan, whole)
        assert scan.check()  # something is wrong, and it is found
    assert opened > 100 and intact > 100 and refused > 100
