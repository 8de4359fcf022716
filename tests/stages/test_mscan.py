"""Scan files of version 2: what is read is what was written, and a stopped writer goes on."""

import json
import resource
import struct
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest

from stages.formats.mscan.reader import open_scan
from stages.formats.mscan.scan import METRICS, BadScan, Block
from stages.formats.mscan.writer import ScanWriter
from tests.stages.scans import (
    ABOUT,
    BLOCKS,
    TEXTS,
    Text,
    assert_close_to,
    make_text,
    read_all,
    write_scan,
)

# --- round trip ------------------------------------------------------------------------------


def test_a_scan_comes_back_as_it_was_written(tmp_path: Path) -> None:
    write_scan(tmp_path / "a.mscan")
    scan = open_scan(tmp_path / "a.mscan")
    assert (scan.version, scan.model, scan.about) == (2, "tiny-model", ABOUT)
    assert scan.blocks == BLOCKS and scan.metrics == METRICS
    assert [sequence.id for sequence in scan.sequences] == [0, 1, 2]
    assert [sequence.source for sequence in scan.sequences] == [text.source for text in TEXTS]
    assert [list(sequence.tokens) for sequence in scan.sequences] == [t.tokens for t in TEXTS]
    assert [sequence.count for sequence in scan.sequences] == [3, 1, 2]
    assert (scan.token_count, scan.complete, scan.problem, scan.check()) == (6, True, None, [])
    for numbers, text in zip(read_all(scan), TEXTS, strict=True):
        assert_close_to(numbers, text)


def test_equal_scans_are_equal_files(tmp_path: Path) -> None:
    assert write_scan(tmp_path / "a.mscan") == write_scan(tmp_path / "b.mscan")


def test_tokens_and_sources_may_be_any_text(tmp_path: Path) -> None:
    tokens = ["", "\n", "\0", "Ġthe", "\u2028", "naïve", "漢", "\U0001f600", "\ud83d", '"\\', " "]
    text = replace(make_text(len(tokens), 0), source="données/漢字", tokens=tokens)
    write_scan(tmp_path / "a.mscan", [text])
    (sequence,) = open_scan(tmp_path / "a.mscan").sequences
    assert (sequence.source, list(sequence.tokens)) == ("données/漢字", tokens)


def test_a_scan_may_have_no_sequences_and_a_sequence_no_tokens(tmp_path: Path) -> None:
    write_scan(tmp_path / "none.mscan", [])
    scan = open_scan(tmp_path / "none.mscan")
    assert (scan.complete, scan.token_count, scan.sequences) == (True, 0, [])
    assert all(len(values) == 0 for values in scan.block(7).values())
    write_scan(tmp_path / "empty.mscan", [make_text(0, 0), TEXTS[1], make_text(0, 2)])
    scan = open_scan(tmp_path / "empty.mscan")
    assert scan.sequence(2)["taylor"].shape == (0, 3)
    np.testing.assert_allclose(scan.token(0)["taylor"], TEXTS[1].taylor[0], rtol=2**-11)


def test_access_by_token_and_by_block_equals_the_whole(tmp_path: Path) -> None:
    texts = [make_text(tokens, seed) for seed, tokens in enumerate((4, 0, 1, 7))]
    write_scan(tmp_path / "a.mscan", texts)
    whole = read_all(open_scan(tmp_path / "a.mscan"))
    scan = open_scan(tmp_path / "a.mscan")
    for name in METRICS:
        rows = np.concatenate([numbers[name] for numbers in whole])
        assert rows.shape == (scan.token_count, len(scan.blocks)) == (12, 3)
        for token in range(12):
            assert np.array_equal(scan.token(token)[name], rows[token])
        for column, block in enumerate(scan.blocks):
            assert np.array_equal(scan.block(block.id)[name], rows[:, column])


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    write_scan(tmp_path / "a.mscan")
    scan = open_scan(tmp_path / "a.mscan")
    for token in (-1, 6):
        with pytest.raises(ValueError, match=f"no token {token}: the scan has 6"):
            scan.token(token)
    for place in (-1, 3):
        with pytest.raises(ValueError, match=f"no sequence {place}: the scan has 3"):
            scan.sequence(place)
    with pytest.raises(ValueError, match="no block has the id 1;"):
        scan.block(1)


# --- precision -------------------------------------------------------------------------------


def one_metric(folder: Path, values: np.ndarray) -> np.ndarray:
    """What comes back of a metric."""
    tokens, count = values.shape
    blocks = [Block(id, f"mlp[{id}]", 0, "ffn group", id, 1) for id in range(count)]
    write_scan(folder / "a.mscan", [Text("data", ["x"] * tokens, values, values, values)], blocks)
    return open_scan(folder / "a.mscan").sequence(0)["gradient"]


def test_tokens_may_differ_by_any_factor_and_blocks_by_eight_decades(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tokens = 10.0 ** np.linspace(-25, 30, 60)[:, None]
    values = (tokens * 10.0 ** rng.uniform(-4, 4, (60, 200))).astype(np.float32)
    found = one_metric(tmp_path, values)
    np.testing.assert_allclose(found, values, rtol=2**-11, atol=0)


def test_zeros_stay_zeros_and_extremes_stay_finite(tmp_path: Path) -> None:
    values = np.array([[0, 0], [0, 1e-45], [1e-38, 1e-42], [2**127, 0], [0, 1]], dtype=np.float32)
    found = one_metric(tmp_path, values)
    assert np.array_equal(found == 0, values == 0)
    np.testing.assert_allclose(found, values, rtol=1e-3)


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("value", [-1e-30, np.nan, np.inf, 1e39, 3.4e38])
def test_numbers_that_no_norm_can_be_are_refused_and_not_written(
    tmp_path: Path, name: str, value: float
) -> None:
    wrong = getattr(TEXTS[0], name).astype(np.float64)
    wrong[2, 1] = value
    with ScanWriter(tmp_path / "a.mscan", "tiny-model", BLOCKS, ABOUT) as writer:
        writer.add(**vars(TEXTS[0]))
        told = rf"{name} is .* at token 2 of sequence 1, block 'model.layers.1.mlp\[3\]'"
        with pytest.raises(ValueError, match=told):
            writer.add(**vars(replace(TEXTS[0], **{name: wrong})))
        writer.add(**vars(TEXTS[1]))
    assert (tmp_path / "a.mscan").read_bytes() == write_scan(tmp_path / "b.mscan", TEXTS[:2])


@pytest.mark.parametrize("shape", [(3, 2), (2, 3), (3,), (3, 3, 1)])
def test_shapes_that_do_not_match_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with ScanWriter(tmp_path / "a.mscan", "tiny-model", BLOCKS) as writer:
        with pytest.raises(ValueError, match=r"taylor has the shape .*, not \(3, 3\)"):
            writer.add(**vars(replace(TEXTS[0], taylor=np.zeros(shape))))
    assert open_scan(tmp_path / "a.mscan").sequences == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"id": 7}, "2 blocks have the id 7: .*mlp.*embed"),
        ({"id": 2**32}, "has the id 4294967296"),
        ({"id": -1}, "has the id -1"),
        ({"layer": -2}, "layer is at least -1"),
        ({"size": 0}, "size at least 1"),
        ({"name": 3}, "of a type that is not Block's"),
        ({"id": True}, "of a type that is not Block's"),
    ],
)
def test_blocks_that_cannot_be_told_apart_are_refused(
    tmp_path: Path, changes: dict, told: str
) -> None:
    blocks = [Block(7, "mlp", 0, "expert", 0, 1), replace(BLOCKS[2], **changes)]
    with pytest.raises(ValueError, match=told):
        ScanWriter(tmp_path / "a.mscan", "tiny-model", blocks)
    assert not (tmp_path / "a.mscan").exists()


def test_other_things_that_make_no_scan_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.mscan"
    with pytest.raises(ValueError, match="at least one block"):
        ScanWriter(path, "tiny-model", [])
    with pytest.raises(ValueError, match="model is None"):
        ScanWriter(path, None, BLOCKS)
    with ScanWriter(path, "tiny-model", BLOCKS) as writer:
        with pytest.raises(ValueError, match="tokens are a list of texts"):
            writer.add(**vars(replace(TEXTS[0], tokens=[1, 2, 3])))
    with pytest.raises(FileExistsError, match="delete it, or go on with ScanWriter.resume"):
        ScanWriter(path, "tiny-model", BLOCKS)


# --- while it is written ---------------------------------------------------------------------


def test_a_file_can_be_read_while_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "a.mscan"
    with ScanWriter(path, "tiny-model", BLOCKS, ABOUT) as writer:
        for count, text in enumerate(TEXTS, start=1):
            writer.add(**vars(text))
            scan = open_scan(path)
            assert len(scan.sequences) == writer.count == count
            assert_close_to(scan.sequence(count - 1), text)
            assert not scan.complete
            assert f"without a footer; {count} whole sequences" in scan.problem
    assert open_scan(path).complete


def test_a_writer_that_an_error_ends_leaves_a_file_to_go_on_with(tmp_path: Path) -> None:
    path = tmp_path / "a.mscan"
    with pytest.raises(KeyboardInterrupt), ScanWriter(path, "tiny-model", BLOCKS, ABOUT) as writer:
        writer.add(**vars(TEXTS[0]))
        raise KeyboardInterrupt
    assert not open_scan(path).complete
    with ScanWriter.resume(path) as writer:
        assert (writer.model, writer.about, writer.blocks) == ("tiny-model", ABOUT, BLOCKS)
        for text in TEXTS[writer.count :]:
            writer.add(**vars(text))
    assert path.read_bytes() == write_scan(tmp_path / "b.mscan")


def test_a_closed_file_can_be_added_to(tmp_path: Path) -> None:
    write_scan(tmp_path / "a.mscan", TEXTS[:2])
    with ScanWriter.resume(tmp_path / "a.mscan") as writer:
        writer.add(**vars(TEXTS[2]))
    assert (tmp_path / "a.mscan").read_bytes() == write_scan(tmp_path / "b.mscan")


def test_a_disk_that_was_full_for_a_while_leaves_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "a.mscan"
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    with ScanWriter(path, "tiny-model", BLOCKS, ABOUT) as writer:
        writer.add(**vars(TEXTS[0]))
        size = path.stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, old[1]))
        try:
            with pytest.raises(OSError):
                writer.add(**vars(TEXTS[1]))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
        assert writer.count == 1 and len(open_scan(path).sequences) == 1
        for text in TEXTS[writer.count :]:
            writer.add(**vars(text))
    assert path.read_bytes() == write_scan(tmp_path / "b.mscan")


def test_numbers_are_looked_at_only_when_they_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.mscan"
    content = bytearray(write_scan(path))
    scale = struct.pack("<f", 0.5 ** (14 - np.frexp(TEXTS[1].activation.max())[1] + 1))
    content[content.index(scale)] ^= 1  # of sequence 1, whose first number is its scale
    path.write_bytes(content)
    scan = open_scan(path)
    assert scan.complete  # as far as is known
    assert_close_to(scan.sequence(0), TEXTS[0])
    assert_close_to(scan.sequence(2), TEXTS[2])
    for ask in (lambda: scan.sequence(1), lambda: scan.token(3), lambda: scan.block(7)):
        with pytest.raises(BadScan, match=r"sequence 1 \('source-1', section at byte .*damaged"):
            ask()
    (said,) = scan.check()
    assert "sequence 1 " in said


# --- layout ----------------------------------------------------------------------------------


def test_the_layout_is_that_of_the_documentation(tmp_path: Path) -> None:
    """A reader after docs/scan-files.md, with nothing of ours."""
    content = write_scan(tmp_path / "a.mscan")
    assert content[:7] == b"MSCAN\x02\x00" and content[7:60] == bytes(53)
    assert struct.unpack_from("<I", content, 60)[0] == crc32(content[:60])
    at, kinds, starts = 64, [], []
    while content[at : at + 4] == b"MSEC":
        kind, size, json_size, json_crc, crc = struct.unpack_from("<4sQQII", content, at + 4)
        text = content[at + 64 : at + 64 + json_size]
        numbers = content[at + 64 + json_size : at + 64 + size]
        assert (crc32(text), crc32(numbers)) == (json_crc, crc)
        assert struct.unpack_from("<I", content, at + 60)[0] == crc32(content[at : at + 60])
        assert at % 64 == size % 64 == json_size % 64 == 0
        fields = json.loads(text)
        if kind == b"SEQN":
            tokens, place = len(fields["tokens"]), 0
            for name in METRICS:
                scales = np.frombuffer(numbers, "<f4", tokens, place)
                place += -(-tokens * 4 // 64) * 64
                values = np.frombuffer(numbers, "<f2", tokens * 3, place).reshape(tokens, 3)
                place += -(-tokens * 3 * 2 // 64) * 64
                expected = getattr(TEXTS[fields["id"]], name)
                np.testing.assert_allclose(values * scales[:, None], expected, rtol=2**-11)
            assert place == len(numbers)
        kinds.append(kind)
        starts.append(at)
        at += 64 + size
    assert kinds == [b"BLKS", b"SEQN", b"SEQN", b"SEQN", b"FOOT"]
    assert fields == {"sections": starts[:-1]}
    assert content[at:] == struct.pack("<Q", starts[-1]) + b"MSCANEND"
