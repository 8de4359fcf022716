"""Scan files of version 1.1: their layout, and how they are read.

    15 bytes      "MSCAN", version 1, bytes of header and JSON, number of records
    JSON          model, time, names of params, sequences
    12 a record   token, param, block in its param, activation, gradient; see RECORD

It has no checksum, no taylor and no texts, and its numbers are 16 bits without a sign. A number is
that times a scale in the JSON; a file without scales, as others write it, holds plain integers. A
block is called by its param and its number in it, "model.layers.0.mlp[3]", and has the id
param * 65,536 + number. A pair of token and block without a record is nan.

Such a file is read whole when it is opened. It is for exchange; what is large belongs in version 2.
"""

import mmap
import re
import struct
from dataclasses import replace
from typing import Any

import numpy as np

from stages.formats.mscan.scan import (
    NO_LAYER,
    BadScan,
    Block,
    Matrix,
    Scan,
    Sequence,
    json_object,
)

HEADER = struct.Struct("<5sHII")
RECORD = np.dtype(
    [
        ("token_idx", "<u4"),
        ("param_id", "<u2"),
        ("block_idx", "<u2"),
        ("activation", "<u2"),
        ("grad_norm", "<u2"),
    ]
)
COLUMNS = {"activation": "activation", "gradient": "grad_norm"}  # metric -> name in a record
SCALES = {name: f"{column}_scale" for name, column in COLUMNS.items()}
FORMAT = "1.1"
MOST = 1 << 16  # params, blocks of a param
LARGEST = MOST - 1  # number in a record
MOST_SCALE = 2.0**112  # beyond it, a number could be too large for float32
SPARSEST = 100  # pairs of token and block that a record may stand for; more is a lie or damage


def read_v1(content: mmap.mmap) -> Scan:
    """Read a whole file of version 1.1.

    A torn one gives the records that are there, and the tokens up to the last of them. BadScan
    where the header or the JSON cannot be read, or promises far more than there are records.
    """
    header, start, stated = _read_header(content)
    names, sequences, scales = _names(header), _sequences(header), _scales(header)
    count = min(stated, (len(content) - start) // RECORD.itemsize)
    records = np.frombuffer(content, RECORD, count, start)
    surplus = len(content) - start - stated * RECORD.itemsize
    problems = []
    if count < stated:
        lost = f"{stated - count} of {stated} records are missing"
        problems.append(f"torn: cut off at byte {len(content)}; {lost}")
        sequences = _cut(sequences, int(records["token_idx"].max()) + 1 if count else 0)
    elif surplus:
        problems.append(f"{surplus} bytes follow the last record")
    tokens = sum(sequence.count for sequence in sequences)
    known = np.isin(records["param_id"], list(names)) & (records["token_idx"] < tokens)
    if not known.all():
        problems.append(f"{(~known).sum()} records of unknown tokens or params are passed over")
        records = records[known]
    each = records["param_id"].astype(np.uint32) * MOST + records["block_idx"]
    ids = np.unique(each)
    columns = np.searchsorted(ids, each)
    if tokens * max(1, len(ids)) > SPARSEST * count:
        raise BadScan(
            f"the header says {tokens} tokens, of {len(ids)} blocks, and there are only {count} "
            "records: it is damaged"
        )
    there = np.zeros((tokens, len(ids)), dtype=bool)
    there[records["token_idx"], columns] = True
    if repeated := len(records) - int(there.sum()):
        problems.append(f"{repeated} records repeat a token and block; the last one counts")
    numbers = {}
    for name, column in COLUMNS.items():
        numbers[name] = np.full((tokens, len(ids)), np.nan, dtype=np.float32)
        values = records[column] * np.float64(scales.get(SCALES[name], 1.0))
        numbers[name][records["token_idx"], columns] = values
    return _scan(header, names, sequences, ids.tolist(), numbers, "; ".join(problems) or None)


def _read_header(content: mmap.mmap) -> tuple[dict[str, Any], int, int]:
    """The JSON, where the records begin, and how many there ought to be."""
    if len(content) < HEADER.size:
        raise BadScan(f"torn: cut off at byte {len(content)}, inside the file header")
    _, _, start, count = HEADER.unpack(content[: HEADER.size])
    if start < HEADER.size:
        raise BadScan(f"the file header is damaged: it says that it has {start} bytes")
    if start > len(content):
        raise BadScan(f"torn: cut off at byte {len(content)}; the JSON ends at byte {start}")
    header = json_object(content[HEADER.size : start], "the header")
    if header.get("format_version") != FORMAT:
        found = header.get("format_version")
        raise BadScan(f"format_version is {found!r}; of version 1, only '{FORMAT}' is read")
    if type(header.get("model_name")) is not str:
        raise BadScan("the header has no model_name")
    return header, start, count


def _names(header: dict[str, Any]) -> dict[int, str]:
    names = header.get("id_to_param_name_map")
    if not isinstance(names, dict) or not all(
        re.fullmatch("[0-9]{1,5}", id) and int(id) < MOST and type(name) is str
        for id, name in names.items()
    ):
        raise BadScan("id_to_param_name_map does not map ids from 0 to 65,535 to names")
    return {int(id): name for id, name in names.items()}


def _sequences(header: dict[str, Any]) -> list[Sequence]:
    entries = header.get("sequences")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise BadScan("the header has no list of sequences")
    sequences = []
    for entry in entries:
        id, count, source = (entry.get(key) for key in ("sequence_id", "num_tokens", "source"))
        if type(id) not in (int, str) or type(count) is not int or count < 0:
            raise BadScan(f"sequence_id {id!r} with num_tokens {count!r} is no sequence")
        if type(source) is not str:
            raise BadScan(f"sequence {id!r} has no source")
        sequences.append(Sequence(id, source, (), count))
    return sequences


def _scales(header: dict[str, Any]) -> dict[str, float]:
    scales = {key: header[key] for key in SCALES.values() if key in header}
    for key, scale in scales.items():
        if type(scale) not in (int, float) or not 0 < scale <= MOST_SCALE:
            raise BadScan(f"{key} is {scale!r}, not a number over 0 (up to 2**112)")
    return scales


def _cut(sequences: list[Sequence], tokens: int) -> list[Sequence]:
    """Sequences up to a number of tokens."""
    kept = []
    for sequence in sequences:
        if tokens <= 0:
            break
        kept.append(replace(sequence, count=min(sequence.count, tokens)))
        tokens -= sequence.count
    return kept


def _scan(
    header: dict[str, Any],
    names: dict[int, str],
    sequences: list[Sequence],
    ids: list[int],
    numbers: dict[str, np.ndarray],
    problem: str | None,
) -> Scan:
    starts = np.cumsum([0, *(sequence.count for sequence in sequences)]).tolist()
    ones = np.ones((starts[-1], 1), dtype=np.float32)

    def matrices(place: int) -> dict[str, Matrix]:
        rows = slice(starts[place], starts[place + 1])
        return {name: Matrix(values[rows], ones[rows]) for name, values in numbers.items()}

    return Scan(
        version=1,
        model=header["model_name"],
        about={key: header[key] for key in header if key not in ("model_name", "sequences")},
        metrics=tuple(COLUMNS),
        blocks=[_block(names[id // MOST], id) for id in ids],
        sequences=sequences,
        problem=problem,
        matrices=matrices,
    )


def _block(param: str, id: int) -> Block:
    """A block with what its param's name tells; rows are counted in blocks, for want of sizes."""
    number = id % MOST
    layer = re.search(r"\.([0-9]{1,6})\.", param)
    return Block(
        id=id,
        name=f"{param}[{number}]",
        layer=int(layer[1]) if layer else NO_LAYER,
        kind=param.removesuffix(".weight").rpartition(".")[2],
        first=number,
        size=1,
    )
