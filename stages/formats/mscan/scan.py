"""What a scan file holds, whatever its version: a matrix of tokens x blocks of three numbers.

    activation  norm of the block's output
    gradient    norm of the loss's gradient by that same output
    taylor      |output . gradient|, the first-order estimate of what removing the block costs
                (Molchanov 2019); a file of version 1 does not have it

The rows are the tokens of all sequences, one sequence behind the other.
"""

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

METRICS = ("activation", "gradient", "taylor")
NO_LAYER = -1  # of a block outside of all layers, such as the embedding
MOST_IDS = 1 << 32  # an id is 4 bytes without a sign


class BadScan(ValueError):
    """A file is not a scan, or what was asked for is in a damaged part of it."""


@dataclass(frozen=True)
class Block:
    """A structural block of a model: what could be removed as one.

    id: unique, 0 to 2**32 - 1.  name: such as "model.layers.0.mlp[3]".  layer: NO_LAYER outside.
    kind: such as "attention head", "kv group", "ffn group", "mamba channels", "expert".
    first, size: which rows of its module it is.
    """

    id: int
    name: str
    layer: int
    kind: str
    first: int
    size: int


@dataclass(frozen=True)
class Sequence:
    """A text that was scanned.

    source: name of the data set.  tokens: the pieces; none where the file keeps no texts (version
    1).  count: how many tokens.
    """

    id: int | str
    source: str
    tokens: tuple[str, ...]
    count: int


@dataclass(frozen=True)
class Matrix:
    """One metric of a sequence of T tokens by N blocks, as it is stored: values * scales."""

    values: np.ndarray  # (T, N) float16 or float32
    scales: np.ndarray  # (T, 1) float32


@dataclass(frozen=True)
class Scan:
    """A scan file that was opened; see stages/formats/mscan/reader.py.

    metrics: those that the file has.  blocks: in the order of the columns.
    problem: None, or a sentence that says what of the file was lost, and where.
    matrices: reads a sequence, given its place; raises BadScan where it is damaged.

    Numbers are float32. They are read and checked when they are asked for, a sequence at a time.
    """

    version: int
    model: str
    about: dict[str, Any]
    metrics: tuple[str, ...]
    blocks: list[Block]
    sequences: list[Sequence]
    problem: str | None
    matrices: Callable[[int], dict[str, Matrix]]

    @property
    def complete(self) -> bool:
        """Whether the file was written to its end, and nothing is known to be lost of it."""
        return self.problem is None

    @property
    def token_count(self) -> int:
        """The tokens of all sequences: T."""
        return self._starts[-1]

    def token(self, token: int) -> dict[str, np.ndarray]:
        """Give all blocks at one token, counted through all sequences: metric -> (N,)."""
        if not 0 <= token < self.token_count:
            raise ValueError(f"no token {token}: the scan has {self.token_count}, from 0 on")
        place = bisect_right(self._starts, token) - 1
        row = token - self._starts[place]
        return {
            name: matrix.values[row] * matrix.scales[row]
            for name, matrix in self.matrices(place).items()
        }

    def block(self, id: int) -> dict[str, np.ndarray]:
        """Give one block at all tokens: metric -> (T,). Reads the whole file."""
        if id not in self._columns:
            raise ValueError(f"no block has the id {id}; see the scan's `blocks`")
        column = self._columns[id]
        parts = {name: [np.empty(0, np.float32)] for name in self.metrics}
        for place in range(len(self.sequences)):
            for name, matrix in self.matrices(place).items():
                parts[name].append(matrix.values[:, column] * matrix.scales[:, 0])
        return {name: np.concatenate(part) for name, part in parts.items()}

    def sequence(self, place: int) -> dict[str, np.ndarray]:
        """Give the sequence at a place of `sequences`: metric -> (tokens of it, N)."""
        if not 0 <= place < len(self.sequences):
            raise ValueError(f"no sequence {place}: the scan has {len(self.sequences)}, from 0 on")
        matrices = self.matrices(place)
        return {name: matrix.values * matrix.scales for name, matrix in matrices.items()}

    def check(self) -> list[str]:
        """Read the whole file and say all that is wrong with it: nothing, if all is well."""
        wrong = [self.problem] if self.problem else []
        for place in range(len(self.sequences)):
            try:
                self.matrices(place)
            except BadScan as error:
                wrong.append(str(error))
        return wrong

    @cached_property
    def _starts(self) -> list[int]:
        """The first token of each sequence, and where the last one ends."""
        return np.cumsum([0, *(sequence.count for sequence in self.sequences)]).tolist()

    @cached_property
    def _columns(self) -> dict[int, int]:
        return {block.id: column for column, block in enumerate(self.blocks)}


def check_blocks(blocks: list[Block]) -> None:
    """Raise ValueError, naming the block, unless all can be written and told apart."""
    if not blocks:
        raise ValueError("a scan needs at least one block, and the list is empty")
    for block in blocks:
        fields = vars(block)
        if not all(type(fields[name]) is kind for name, kind in Block.__annotations__.items()):
            raise ValueError(f"{block} has a field of a type that is not Block's")
        if not 0 <= block.id < MOST_IDS:
            raise ValueError(f"block '{block.name}' has the id {block.id}, not 0 to 2**32 - 1")
        if block.layer < NO_LAYER or block.first < 0 or block.size < 1:
            raise ValueError(f"{block}: layer is at least -1, first at least 0, size at least 1")
    id, count = Counter(block.id for block in blocks).most_common(1)[0]
    if count > 1:
        names = ", ".join(f"'{block.name}'" for block in blocks if block.id == id)
        raise ValueError(f"{count} blocks have the id {id}: {names}; ids are unique")


def json_object(text: bytes, what: str) -> dict[str, Any]:
    """Parse a JSON object; BadScan, naming `what`, where it is none."""
    try:
        fields = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested without end
        raise BadScan(f"{what} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise BadScan(f"{what} is not a JSON object")
    return fields
