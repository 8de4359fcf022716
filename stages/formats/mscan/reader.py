"""Opens scan files of both versions, whole or torn.

A file of version 2 is walked from its beginning: headers and JSON are read and checked, matrices
are not. What ends the walk is the footer or the first section that is torn or damaged; the
sequences before it are the scan, and `problem` says what ended it. So no number is ever taken
from behind a damage, and the footer is only proof that the writer came to its end.
"""

import mmap
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from stages.formats.mscan import v1
from stages.formats.mscan.scan import METRICS, BadScan, Block, Matrix, Scan, Sequence, check_blocks
from stages.formats.mscan.sections import (
    BLOCKS,
    END,
    END_MARK,
    FILE_HEADER,
    FOOTER,
    MAGIC,
    SEQUENCE,
    START,
    VERSION,
    Section,
    Torn,
    file_header,
    numbers_size,
    read_matrices,
    read_section,
)


@dataclass(frozen=True)
class Walk:
    """The whole sections at the beginning of a file of version 2.

    sections: that of the blocks, then one a sequence.  problem: as in Scan.
    appendable: whether nothing follows them but a footer or what a stopped writer left.
    """

    model: str
    about: dict[str, Any]
    blocks: list[Block]
    sequences: list[Sequence]
    sections: list[Section]
    problem: str | None
    appendable: bool


def open_scan(path: str | Path) -> Scan:
    """Open a scan file of version 1 or 2: one of version 2 is mapped, not read.

    A file of version 2 that is torn or damaged behind its first section opens to what comes
    before, with a `problem`. Raises BadScan, saying why, where nothing can be read. Numbers of
    version 2 are checked a sequence at a time, when first asked for: BadScan names a damaged one.
    """
    path = Path(path)
    content = map_file(path)
    try:
        if version_of(content) == 1:
            return v1.read_v1(content)
        found = walk(content)
    except BadScan as error:
        raise BadScan(f"{path}: {error}") from error

    @cache
    def matrices(place: int) -> dict[str, Matrix]:
        section, sequence = found.sections[1 + place], found.sequences[place]
        numbers = read_matrices(content, section, sequence.count, len(found.blocks))
        if numbers is None:
            raise BadScan(
                f"{path}: the numbers of sequence {place} ('{sequence.source}', section at byte "
                f"{section.start}) are damaged: their checksum differs; scan it again"
            )
        return numbers

    return Scan(
        version=VERSION,
        model=found.model,
        about=found.about,
        metrics=METRICS,
        blocks=found.blocks,
        sequences=found.sequences,
        problem=found.problem,
        matrices=matrices,
    )


def map_file(path: Path) -> mmap.mmap:
    """Map a file for reading; BadScan where it is empty."""
    with path.open("rb") as stream:
        if not path.stat().st_size:
            raise BadScan(f"{path}: the file is empty")
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)


def version_of(content: mmap.mmap) -> int:
    """Tell the version from the first 7 bytes; BadScan where it is none that is read."""
    if len(content) < START.size:
        raise BadScan(f"torn: the file has only {len(content)} bytes")
    magic, version = START.unpack(content[: START.size])
    if magic != MAGIC:
        raise BadScan(f"not a scan file: it begins with {magic!r}, not {MAGIC!r}")
    if version not in (1, VERSION):
        raise BadScan(f"a scan file of version {version}; only 1 and {VERSION} are read")
    return version


def walk(content: mmap.mmap) -> Walk:
    """Read headers and JSON from the beginning on, up to the footer or the first damage.

    Raises BadScan where the file header or the section of the blocks is torn or damaged.
    """
    if len(content) < FILE_HEADER.size:
        raise BadScan(f"torn: cut off at byte {len(content)}, inside the file header")
    if content[: FILE_HEADER.size] != file_header():
        raise BadScan("the file header is damaged")
    first = read_section(content, FILE_HEADER.size)
    model, about, blocks = _blocks_of(first)
    sections, sequences = [first], []
    problem, appendable = None, True
    while True:
        try:
            section = read_section(content, sections[-1].end)
            if section.kind == FOOTER:
                problem = _footer_problem(content, section, sections)
                break
            sequences.append(_sequence_of(section, len(blocks)))
            sections.append(section)
        except BadScan as error:
            problem, appendable = str(error), isinstance(error, Torn)
            break
    if problem:
        problem += f"; {len(sequences)} whole sequences before it"
    return Walk(model, about, blocks, sequences, sections, problem, appendable)


def _blocks_of(section: Section) -> tuple[str, dict[str, Any], list[Block]]:
    """Model, what the scan is about, and blocks, of the first section."""
    if section.kind != BLOCKS:
        raise BadScan(f"the first section is of kind {section.kind!r}, not {BLOCKS!r}")
    try:
        model, about = section.fields["model"], section.fields["about"]
        blocks = [Block(**entry) for entry in section.fields["blocks"]]
        check_blocks(blocks)
    except (KeyError, TypeError, ValueError) as error:
        raise BadScan(f"the section of the blocks does not say what it must: {error}") from error
    if not isinstance(model, str) or not isinstance(about, dict):
        raise BadScan("the section of the blocks does not say what it must: model and about")
    return model, about, blocks


def _sequence_of(section: Section, blocks: int) -> Sequence:
    """What a section says of its sequence, if it has all the numbers of it."""
    where = f"the section at byte {section.start}"
    if section.kind != SEQUENCE:
        raise BadScan(f"{where} is of unknown kind {section.kind!r}")
    id, source, tokens = (section.fields.get(name) for name in ("id", "source", "tokens"))
    types = type(id) is int and type(source) is str and type(tokens) is list
    if not types or not all(type(token) is str for token in tokens):
        raise BadScan(f"{where} does not say what it must: id, source and tokens")
    size, expected = section.end - section.numbers, numbers_size(len(tokens), blocks)
    if size != expected:
        raise BadScan(f"{where} has {size} bytes of numbers; its tokens and blocks take {expected}")
    return Sequence(id, source, tuple(tokens), len(tokens))


def _footer_problem(content: mmap.mmap, footer: Section, sections: list[Section]) -> str | None:
    """What is wrong with the end of a file, from the footer on; None if nothing."""
    starts = [section.start for section in sections]
    if footer.fields.get("sections") != starts:
        return f"the footer at byte {footer.start} contradicts the sections that were found"
    expected = END_MARK.pack(footer.start, END)
    rest = content[footer.end : footer.end + len(expected) + 1]
    if rest == expected:
        return None
    if expected.startswith(rest):
        return f"torn: the end mark is cut off at byte {len(content)}"
    return f"at byte {footer.end} there is something else than the end mark"
