"""Writes scan files of version 2, a sequence at a time, at their final place.

    with ScanWriter(path, model, blocks, about) as writer:
        writer.add(source, tokens, activation, gradient, taylor)

What was added is in the file when `add` returns: when the process is killed, the file opens to the
whole sequences before. ScanWriter.resume goes on behind them, and the finished file is to the bit
what one run would have written.
"""

import os
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import ArrayLike

from stages.formats.mscan.reader import map_file, version_of, walk
from stages.formats.mscan.scan import METRICS, BadScan, Block, check_blocks
from stages.formats.mscan.sections import (
    BLOCKS,
    END,
    END_MARK,
    FOOTER,
    SEQUENCE,
    VERSION,
    file_header,
    pack_matrix,
    write_section,
)

LARGEST = 2.0**127  # that float16 with a scale can round without an overflow of float32


class ScanWriter:
    """A scan file that is being written.

    model: name.  blocks: N of them, in the order of the columns.  count: sequences in the file.
    about: what else a reader should know; anything that JSON can say.

    Left by an error, or never closed, the file has no footer and can be resumed.
    """

    model: str
    about: dict[str, Any]
    blocks: list[Block]

    def __init__(
        self, path: str | Path, model: str, blocks: list[Block], about: dict[str, Any] | None = None
    ) -> None:
        """Begin a file; its place is taken when its blocks are in it.

        Raises ValueError for blocks that cannot be told apart, and FileExistsError.
        """
        path = Path(path)
        if path.exists():
            raise FileExistsError(f"{path} exists; delete it, or go on with ScanWriter.resume")
        if type(model) is not str:
            raise ValueError(f"model is {model!r}; it must be a name")
        check_blocks(blocks)
        fields = {"model": model, "about": about or {}, "blocks": [vars(block) for block in blocks]}
        part = path.with_name(path.name + ".part")
        stream = part.open("wb")
        stream.write(file_header())
        self._take_up(stream, model, fields["about"], blocks, [])
        self._append(BLOCKS, fields, [])
        part.rename(path)

    @classmethod
    def resume(cls, path: str | Path) -> Self:
        """Open a file to add sequences behind its whole ones, over a torn end or the footer.

        The writer's model, about, blocks and count say what is there. Raises BadScan, and leaves
        the file as it is, where it is damaged and not just torn, or of version 1.
        """
        path = Path(path)
        content = map_file(path)
        try:
            if version_of(content) != VERSION:
                raise BadScan(f"only a file of version {VERSION} can be added to")
            found = walk(content)
            if not found.appendable:
                raise BadScan(f"damaged, not just torn, so nothing is dropped: {found.problem}")
        except BadScan as error:
            raise BadScan(f"{path}: {error}; write a new file") from error
        stream = path.open("r+b")
        stream.seek(found.sections[-1].end)
        writer = cls.__new__(cls)
        starts = [section.start for section in found.sections]
        writer._take_up(stream, found.model, found.about, found.blocks, starts)
        return writer

    @property
    def count(self) -> int:
        """How many sequences are in the file."""
        return len(self._starts) - 1

    def add(
        self,
        source: str,
        tokens: list[str],
        activation: ArrayLike,
        gradient: ArrayLike,
        taylor: ArrayLike,
    ) -> None:
        """Append a sequence of T tokens, of the data set `source`.

        activation, gradient, taylor: (T, N), finite and not negative. A stored number is within
        2**-11 of its value, relatively, if it is not 2**29 times smaller than the largest of its
        token. Raises ValueError, and writes nothing, for other shapes or values.
        """
        if type(source) is not str or not all(type(token) is str for token in tokens):
            raise ValueError("source is a text, and tokens are a list of texts")
        numbers = []
        for name, values in zip(METRICS, (activation, gradient, taylor), strict=True):
            numbers += pack_matrix(self._checked(name, values, len(tokens)))
        fields = {"id": self.count, "source": source, "tokens": list(tokens)}
        self._append(SEQUENCE, fields, numbers)

    def close(self) -> None:
        """Write the footer and make sure that all is on the disk."""
        if self._stream.closed:
            return
        footer = self._end
        self._append(FOOTER, {"sections": self._starts}, [])
        self._stream.write(END_MARK.pack(footer, END))
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        else:
            self._stream.close()

    def _take_up(
        self,
        stream: BinaryIO,
        model: str,
        about: dict[str, Any],
        blocks: list[Block],
        starts: list[int],
    ) -> None:
        self.model, self.about, self.blocks = model, about, blocks
        self._stream, self._starts, self._end = stream, starts, stream.tell()

    def _append(self, kind: bytes, fields: dict[str, Any], numbers: list[bytes]) -> None:
        """Write a section behind the whole ones, over what a failed call may have left there."""
        self._stream.seek(self._end)
        self._stream.truncate()
        write_section(self._stream, kind, fields, numbers)
        self._stream.flush()
        if kind != FOOTER:
            self._starts.append(self._end)
        self._end = self._stream.tell()

    def _checked(self, name: str, values: ArrayLike, tokens: int) -> np.ndarray:
        """One metric of a sequence as (T, N) float32."""
        with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused
            array = np.asarray(values, dtype=np.float32)
        expected = (tokens, len(self.blocks))
        if array.shape != expected:
            raise ValueError(
                f"{name} has the shape {array.shape}, not {expected}: tokens x blocks of the scan"
            )
        good = (array >= 0) & (array <= LARGEST)
        if not good.all():
            token, column = np.argwhere(~good)[0]
            raise ValueError(
                f"{name} is {array[token, column]} at token {token} of sequence {self.count}, block"
                f" '{self.blocks[column].name}'; it must be finite and not negative"
            )
        return array
