"""The bytes of a scan file of version 2; docs/scan-files.md has them as tables.

    file header   "MSCAN", version, checksum
    blocks        a section: model, what the scan is about, all blocks
    sequence      a section a sequence: its tokens, then three matrices
    footer        a section: where the others begin
    end mark      where the footer begins

All begin at multiples of 64 bytes, and so does every matrix, so that it can be used where it lies
in a mapped file. Every byte is under some checksum or has one allowed value.

A matrix is float16 with one float32 scale a row (a token). Float16 has 11 significant bits over
nine decades (2**-14 to 2**15), which is 5e-4 of a value, but only there: a gradient of 1e-9 would
be 0 without a scale. Within a token, blocks lie well inside of nine decades; between tokens (the
first one takes huge activations) and between models they need not, so a scale a row, for 4 bytes
beside 2 N. It is the power of two that brings the row's largest value to 2**14 or more: then
multiplying rounds nothing, and the only error is that of float16. What is 2**29 times smaller than
its row's largest loses digits, and 0 is what is 2**39 times smaller.
"""

import json
import mmap
import struct
from dataclasses import dataclass
from typing import Any, BinaryIO
from zlib import crc32

import numpy as np

from stages.formats.mscan.scan import METRICS, BadScan, Matrix, json_object

MAGIC, VERSION = b"MSCAN", 2
START = struct.Struct("<5sH")  # of both versions: magic, version
FILE_HEADER = struct.Struct("<5sH53xI")  # magic, version, zeros, CRC-32 of the 60 bytes before
# magic, kind, bytes behind this header, bytes of JSON, CRC-32 of the JSON, CRC-32 of the numbers,
# zeros, CRC-32 of the 60 bytes before
SECTION_HEADER = struct.Struct("<4s4sQQII28xI")
SECTION = b"MSEC"
BLOCKS, SEQUENCE, FOOTER = b"BLKS", b"SEQN", b"FOOT"
END_MARK = struct.Struct("<Q8s")  # where the footer begins, and:
END = b"MSCANEND"
ALIGN = 64
LOWEST_EXPONENT = -126  # of a float32 with all its digits


class Torn(BadScan):
    """The file ends inside a section: its writer was stopped there."""


@dataclass(frozen=True)
class Section:
    """A section whose header and JSON are intact; its numbers have not been looked at."""

    kind: bytes
    start: int
    fields: dict[str, Any]  # the JSON
    numbers: int  # where they begin
    numbers_crc: int
    end: int


def padded(size: int) -> int:
    """The next multiple of 64."""
    return -(-size // ALIGN) * ALIGN


def file_header() -> bytes:
    """The 64 bytes that a file begins with."""
    return _with_checksum(FILE_HEADER.pack(MAGIC, VERSION, 0))


def write_section(
    stream: BinaryIO, kind: bytes, fields: dict[str, Any], numbers: list[bytes]
) -> None:
    """Write a section; `numbers` are one behind the other, each of a multiple of 64 bytes."""
    text = json.dumps(fields, allow_nan=False).encode("ascii")
    text = text.ljust(padded(len(text)))  # spaces are JSON
    size, checksum = len(text), 0
    for part in numbers:
        size, checksum = size + len(part), crc32(part, checksum)
    header = SECTION_HEADER.pack(SECTION, kind, size, len(text), crc32(text), checksum, 0)
    stream.write(_with_checksum(header))
    stream.write(text)
    for part in numbers:
        stream.write(part)


def read_section(content: mmap.mmap, start: int) -> Section:
    """Read a section's header and JSON.

    Lengths are compared with the file's before anything is read by them. Raises Torn where the
    file ends inside the section, and BadScan where it is damaged.
    """
    if start == len(content):
        raise Torn(f"torn: the file ends at byte {start}, without a footer")
    if start + SECTION_HEADER.size > len(content):
        raise Torn(f"torn: the section at byte {start} is cut off at byte {len(content)}")
    header = content[start : start + SECTION_HEADER.size]
    magic, kind, size, text_size, text_crc, numbers_crc, _ = SECTION_HEADER.unpack(header)
    if magic != SECTION or header != _with_checksum(header):
        raise BadScan(f"the section at byte {start} is damaged (its header)")
    if size % ALIGN or text_size % ALIGN or text_size > size:
        raise BadScan(f"the section at byte {start} has lengths that cannot be: {size} bytes")
    text_start = start + SECTION_HEADER.size
    if text_start + size > len(content):
        raise Torn(f"torn: the section at byte {start} is cut off at byte {len(content)}")
    text = content[text_start : text_start + text_size]
    if crc32(text) != text_crc:
        raise BadScan(f"the section at byte {start} is damaged (its JSON)")
    return Section(
        kind=kind,
        start=start,
        fields=json_object(text, f"the JSON of the section at byte {start}"),
        numbers=text_start + text_size,
        numbers_crc=numbers_crc,
        end=text_start + size,
    )


def numbers_size(tokens: int, blocks: int) -> int:
    """Bytes of the numbers of a sequence."""
    return len(METRICS) * (padded(4 * tokens) + padded(2 * tokens * blocks))


def pack_matrix(values: np.ndarray) -> list[bytes]:
    """Turn (T, N) float32, finite and up to 2**127, into the bytes of scales and of values."""
    _, exponents = np.frexp(values.max(axis=1, keepdims=True, initial=0))
    exponents = np.maximum(exponents - 15, LOWEST_EXPONENT)  # largest: 2**14 to 2**15
    scales = np.ldexp(np.float32(1), exponents).astype("<f4")
    parts = scales.tobytes(), (values / scales).astype("<f2").tobytes()
    return [part.ljust(padded(len(part)), b"\0") for part in parts]


def read_matrices(
    content: mmap.mmap, section: Section, tokens: int, blocks: int
) -> dict[str, Matrix] | None:
    """Give the three matrices of a sequence where they lie; None where their checksum differs."""
    if crc32(memoryview(content)[section.numbers : section.end]) != section.numbers_crc:
        return None
    matrices, at = {}, section.numbers
    for name in METRICS:
        scales = np.frombuffer(content, "<f4", tokens, at)
        at += padded(4 * tokens)
        values = np.frombuffer(content, "<f2", tokens * blocks, at)
        at += padded(2 * tokens * blocks)
        matrices[name] = Matrix(values.reshape(tokens, blocks), scales.reshape(tokens, 1))
    return matrices


def _with_checksum(header: bytes) -> bytes:
    """The header with its last 4 bytes made the CRC-32 of those before."""
    return header[:-4] + struct.pack("<I", crc32(header[:-4]))
