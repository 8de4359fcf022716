"""Scan files of version 1.1: as others write and read them, to the byte."""

import random
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stages.formats.mscan.reader import open_scan
from stages.formats.mscan.scan import BadScan, Block, Scan
from stages.formats.mscan.v1_writer import write_v1
from stages.formats.mscan.writer import ScanWriter
from tests.stages.scans import BLOCKS, Text, harm, put, write_scan

HARMED = 1000
MLP, HEAD = "model.layers.0.mlp", "model.layers.11.self_attn.q_proj.weight"
JSON = (
    '{"format_version": "1.1", "model_name": "org/tiny", "timestamp": "2025-08-01T12:00:00", '
    '"id_to_param_name_map": {"0": "' + MLP + '", "5": "' + HEAD + '", "6": "lm_head"}, '
    '"sequences": [{"sequence_id": 0, "num_tokens": 2, "source": "wiki"}, '
    '{"sequence_id": 1, "num_tokens": 2, "source": "caf\\u00e9"}]'
)
RECORDS = [  # token, param, block, activation, gradient; the last token has none
    (0, 0, 0, 10, 1),
    (0, 0, 3, 20, 0),
    (0, 5, 65535, 65535, 2),
    (1, 0, 0, 11, 3),
    (1, 5, 65535, 0, 0),
    (2, 0, 0, 12, 4),
    (2, 0, 3, 898, 5),
    (2, 5, 65535, 32, 65535),
]
START = 15 + len(JSON) + 1


def hand_made(
    header: str = JSON + "}", records: list[tuple[int, ...]] = RECORDS, count: int | None = None
) -> bytes:
    """A file of version 1.1 made of nothing of ours."""
    count = len(records) if count is None else count
    content = struct.pack("<5sHII", b"MSCAN", 1, 15 + len(header), count) + header.encode()
    return content + b"".join(struct.pack("<IHHHH", *record) for record in records)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.mscan"


def opened(path: Path, content: bytes) -> Scan:
    put(path, content)
    return open_scan(path)


# --- by hand ---------------------------------------------------------------------------------


def test_a_file_made_by_hand_is_read(path: Path) -> None:
    scan = opened(path, hand_made())
    assert (scan.version, scan.model, scan.complete) == (1, "org/tiny", True)
    assert scan.about["timestamp"] == "2025-08-01T12:00:00"
    assert scan.metrics == ("activation", "gradient")  # no taylor: not zeros
    assert scan.token_count == 4  # as the sequences say, though no record names the last
    assert [(s.id, s.source, s.count, s.tokens) for s in scan.sequences] == [
        (0, "wiki", 2, ()), (1, "café", 2, ()),
    ]  # fmt: skip
    assert scan.blocks == [
        Block(0, f"{MLP}[0]", 0, "mlp", 0, 1),
        Block(3, f"{MLP}[3]", 0, "mlp", 3, 1),
        Block(5 * 65536 + 65535, f"{HEAD}[65535]", 11, "q_proj", 65535, 1),
    ]
    none = np.nan
    activation = np.float32([[10, 20, 65535], [11, none, 0], [12, 898, 32], [none] * 3])
    gradient = np.float32([[1, 0, 2], [3, none, 0], [4, 5, 65535], [none] * 3])
    for name, expected in (("activation", activation), ("gradient", gradient)):
        whole = np.concatenate([scan.sequence(0)[name], scan.sequence(1)[name]])
        assert whole.dtype == np.float32
        np.testing.assert_array_equal(whole, expected)
        tokens = [scan.token(token)[name] for token in range(4)]
        np.testing.assert_array_equal(tokens, expected)
        blocks = [scan.block(block.id)[name] for block in scan.blocks]
        np.testing.assert_array_equal(blocks, expected.T)


@pytest.mark.parametrize(
    "header",
    [
        JSON + "}",
        JSON + ', "activation_scale": 0.25, "grad_norm_scale": 3e-13}',
        JSON + ', "grad_norm_scale": 1e-07, "note": [1]}',
        JSON.replace('"sequence_id": 0', '"sequence_id": "first"') + "}",
        JSON.replace("org/tiny", "\\u6f22") + "}",
    ],
)
def test_a_file_made_by_hand_is_written_to_the_byte(path: Path, header: str) -> None:
    content = hand_made(header)
    scan = opened(path, content)
    write_v1(path.with_name("b.mscan"), scan)
    assert path.with_name("b.mscan").read_bytes() == content
    write_v1(path, scan)  # over itself
    assert path.read_bytes() == content


def test_a_file_of_no_records_is_written_to_the_byte(path: Path) -> None:
    content = hand_made(JSON.replace('"num_tokens": 2', '"num_tokens": 0') + "}", [])
    write_v1(path, opened(path, content))
    assert path.read_bytes() == content


def test_scales_in_the_json_make_numbers_of_the_integers(path: Path) -> None:
    header = JSON + ', "activation_scale": 0.25, "grad_norm_scale": 3e-13}'
    scan = opened(path, hand_made(header))
    np.testing.assert_allclose(scan.token(0)["activation"], [2.5, 5, 65535 / 4])
    np.testing.assert_allclose(scan.token(2)["gradient"], [1.2e-12, 1.5e-12, 65535 * 3e-13])


# --- from version 2 --------------------------------------------------------------------------


def test_a_scan_of_version_2_is_written_with_scales_so_that_gradients_are_not_0(
    path: Path,
) -> None:
    write_scan(path)
    scan = open_scan(path)
    write_v1(path.with_name("b.mscan"), scan, timestamp="now")
    found = open_scan(path.with_name("b.mscan"))
    assert (found.model, found.complete, found.about["timestamp"]) == (scan.model, True, "now")
    assert list(found.about["id_to_param_name_map"].values()) == [
        "model.layers.0.self_attn", "model.layers.1.mlp", "model.embed_tokens",
    ]  # fmt: skip
    names = [*(block.name for block in BLOCKS[:2]), "model.embed_tokens[0]"]
    assert [block.name for block in found.blocks] == names
    assert found.sequences == [replace(sequence, tokens=()) for sequence in scan.sequences]
    for name, key in (("activation", "activation_scale"), ("gradient", "grad_norm_scale")):
        written = np.concatenate([scan.sequence(place)[name] for place in range(3)])
        read = np.concatenate([found.sequence(place)[name] for place in range(3)])
        assert found.about[key] == pytest.approx(written.max() / 65535)
        np.testing.assert_allclose(read, written, rtol=1e-6, atol=found.about[key] / 2)
        assert read.max() > 0
    again = path.with_name("c.mscan")
    write_v1(again, found)
    assert again.read_bytes() == path.with_name("b.mscan").read_bytes()


def test_extreme_and_zero_numbers_survive(path: Path) -> None:
    numbers = np.array([[0, 2.0**127], [2.0**126, 0]], np.float32)
    text = Text("data", ["a", "b"], numbers, np.zeros((2, 2)), np.zeros((2, 2)))
    write_scan(path, [text], BLOCKS[:2])
    write_v1(path, open_scan(path))
    found = open_scan(path).sequence(0)
    np.testing.assert_allclose(found["activation"], numbers, rtol=1e-4)
    assert not found["gradient"].any()


def test_the_time_is_taken_from_the_scan_or_now(path: Path) -> None:
    write_scan(path)
    write_v1(path, open_scan(path))
    assert open_scan(path).about["timestamp"] > "2025"
    write_v1(path, open_scan(path), timestamp="then")
    write_v1(path, open_scan(path))
    assert open_scan(path).about["timestamp"] == "then"


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["mlp[0]", "mlp[65536]"], r"block 'mlp\[65536\]': .*65,536 blocks of each"),
        ([f"p{id}" for id in range(65537)], "block 'p65536': .*65,536 params"),
        (["mlp", "mlp[0]"], r"'mlp' and 'mlp\[0\]' are one"),
    ],
    ids=["blocks", "params", "same"],
)
def test_blocks_that_version_1_cannot_number_are_refused(
    path: Path, names: list[str], told: str
) -> None:
    blocks = [Block(id, name, 0, "expert", 0, 1) for id, name in enumerate(names)]
    write_scan(path)
    with pytest.raises(ValueError, match=f"{told}.*write version 2"):
        write_v1(path.with_name("b.mscan"), replace(open_scan(path), blocks=blocks))
    assert not path.with_name("b.mscan").exists()


def test_a_file_of_version_1_cannot_be_added_to(path: Path) -> None:
    put(path, hand_made())
    with pytest.raises(BadScan, match="only a file of version 2 can be added to"):
        ScanWriter.resume(path)
    assert path.read_bytes() == hand_made()


# --- torn and contradictory ------------------------------------------------------------------


def test_a_file_cut_at_any_byte_gives_the_records_that_are_there(path: Path) -> None:
    content = hand_made()
    whole = opened(path, content)
    for cut in range(1, len(content)):
        if cut < START:
            with pytest.raises(BadScan, match="torn: "):
                opened(path, content[:cut])
            continue
        scan = opened(path, content[:cut])
        there = RECORDS[: (cut - START) // 12]
        lost = 8 - len(there)
        assert scan.problem == f"torn: cut off at byte {cut}; {lost} of 8 records are missing"
        assert scan.token_count == max((record[0] + 1 for record in there), default=0)
        found = 0
        for token in range(scan.token_count):
            for name in scan.metrics:
                values = dict(zip(whole.blocks, whole.token(token)[name], strict=True))
                for block, value in zip(scan.blocks, scan.token(token)[name], strict=True):
                    assert np.isnan(value) or value == values[block]
                    found += not np.isnan(value)
        assert found == 2 * len(there)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (hand_made() + b"\0" * 5, "5 bytes follow the last record"),
        (hand_made(records=[*RECORDS, (4, 0, 0, 1, 1)]), "1 records of unknown tokens or params"),
        (hand_made(records=[*RECORDS, (3, 1, 0, 1, 1)]), "1 records of unknown tokens or params"),
        (hand_made(records=[*RECORDS, (2, 0, 0, 12, 4)]), "1 records repeat a token and block"),
    ],
)
def test_what_contradicts_is_told(path: Path, content: bytes, told: str) -> None:
    whole = opened(path, hand_made())
    scan = opened(path, content)
    assert told in scan.problem and not scan.complete and scan.check() == [scan.problem]
    for place in range(2):
        for name, values in scan.sequence(place).items():
            np.testing.assert_array_equal(values, whole.sequence(place)[name])


@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("tokens", [10**4, 2**32 - 1, 2**60, 10**40])
def test_more_tokens_than_there_can_be_are_refused(path: Path, tokens: int, torn: bool) -> None:
    header = JSON.replace('"num_tokens": 2', f'"num_tokens": {tokens}') + "}"
    records = [*RECORDS, (2**32 - 2, 0, 0, 1, 1)]
    with pytest.raises(BadScan, match="there are only 9 records: it is damaged"):
        opened(path, hand_made(header, records, 2**32 - 1 if torn else None))


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('"1.1"', '"1.0"', "format_version is '1.0'; of version 1, only '1.1' is read"),
        ("org/tiny", "org\\xiny", "the header is not JSON"),
        ('"org/tiny"', "3", "the header has no model_name"),
        ('"5": ', '"65536": ', "id_to_param_name_map does not map ids"),
        ('"5": ', '"-5": ', "id_to_param_name_map does not map ids"),
        ('"lm_head"', "1", "id_to_param_name_map does not map ids"),
        ('"sequences": [', '"sequences": [3, ', "no list of sequences"),
        ('"num_tokens": 2', '"num_tokens": -2', "'?num_tokens'? -2 is no sequence"),
        ('"num_tokens": 2', '"num_tokens": 2.5', "num_tokens 2.5 is no sequence"),
        ('"wiki"', "null", "sequence 0 has no source"),
        ('"model_name"', '"activation_scale": 0, "model_name"', "activation_scale is 0, not"),
        ('"model_name"', '"grad_norm_scale": NaN, "model_name"', "grad_norm_scale is nan, not"),
        ('"model_name"', '"grad_norm_scale": 1e300, "model_name"', "grad_norm_scale is 1e\\+300"),
    ],
)
def test_a_header_that_says_something_else_is_refused(
    path: Path, old: str, new: str, told: str
) -> None:
    with pytest.raises(BadScan, match=f"a.mscan: .*{told}"):
        opened(path, hand_made(JSON.replace(old, new) + "}"))


def test_a_lying_length_of_the_header_is_refused(path: Path) -> None:
    for size, told in ((2**32 - 1, "torn: cut off"), (14, "damaged"), (15, "not JSON")):
        content = bytearray(hand_made())
        content[7:11] = struct.pack("<I", size)
        with pytest.raises(BadScan, match=told):
            opened(path, bytes(content))


def test_a_harmed_file_gives_an_error_or_numbers_of_the_right_shape(path: Path) -> None:
    """There is no checksum: a flipped bit of a number cannot be noticed."""
    content, good, refused = hand_made(), 0, 0
    for seed in range(HARMED):
        try:
            scan = opened(path, harm(content, random.Random(seed)))
        except BadScan:
            refused += 1
            continue
        good += 1
        for place, sequence in enumerate(scan.sequences):
            for values in scan.sequence(place).values():
                assert values.shape == (sequence.count, len(scan.blocks))
        for token in range(scan.token_count):
            assert all(len(values) == len(scan.blocks) for values in scan.token(token).values())
        for block in scan.blocks:
            assert all(len(values) == scan.token_count for values in scan.block(block.id).values())
        if scan.complete:
            write_v1(path, scan)
    assert good > 100 and refused > 100
