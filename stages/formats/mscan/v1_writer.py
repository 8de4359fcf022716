"""Writes scan files of version 1.1, for those who read no other; v1.py has the layout."""

import json
import re
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from stages.formats.mscan.scan import Scan
from stages.formats.mscan.v1 import COLUMNS, FORMAT, HEADER, LARGEST, MOST, RECORD, SCALES


def write_v1(path: str | Path, scan: Scan, timestamp: str | None = None) -> None:
    """Write a scan as a file of version 1.1, without its taylor and its texts.

    timestamp: what to write as the time; if None, that of a scan of version 1, else now.

    A scan of version 1 is written as it was read: to the byte, if its records were in the order of
    tokens, params and blocks and its JSON as json.dumps writes it. Another one gets a scale a
    metric, largest / 65,535, so numbers are within half a scale, and smaller ones are 0.
    Raises ValueError where version 1 cannot number the blocks or records.
    """
    names, pairs = _numbering(scan)
    count, scales = _measure(scan)
    if count >= 1 << 32:
        raise ValueError(f"version 1 counts to 2**32 - 1 records, not {count}; write version 2")
    old = scan.about if scan.version == 1 else scales
    timestamp = timestamp or old.get("timestamp") or datetime.now(UTC).isoformat(timespec="seconds")
    header = {
        "format_version": FORMAT,
        "model_name": scan.model,
        "timestamp": timestamp,
        "id_to_param_name_map": names,
        "sequences": [
            {"sequence_id": sequence.id, "num_tokens": sequence.count, "source": sequence.source}
            for sequence in scan.sequences
        ],
    }
    header |= {key: value for key, value in old.items() if key not in header}
    text = json.dumps(header).encode("ascii")
    path = Path(path)
    part = path.with_name(path.name + ".part")
    with part.open("wb") as stream:
        stream.write(HEADER.pack(b"MSCAN", 1, HEADER.size + len(text), count))
        stream.write(text)
        first = 0
        for place, sequence in enumerate(scan.sequences):
            stream.write(_records(scan.sequence(place), first, pairs, scales).tobytes())
            first += sequence.count
    part.replace(path)


def _numbering(scan: Scan) -> tuple[dict[str, str], list[tuple[int, int]]]:
    """Names of params by id, and the param and number of each block."""
    if scan.version == 1:
        pairs = [divmod(block.id, MOST) for block in scan.blocks]
        return scan.about["id_to_param_name_map"], pairs
    params: dict[str, int] = {}
    taken: dict[tuple[int, int], str] = {}
    for block in scan.blocks:
        found = re.fullmatch(r"(.+)\[([0-9]+)\]", block.name, re.DOTALL)
        name, number = (found[1], int(found[2])) if found else (block.name, 0)
        pair = params.setdefault(name, len(params)), number
        if number > LARGEST or len(params) > MOST:
            raise ValueError(
                f"block '{block.name}': version 1 has numbers for 65,536 params and for 65,536 "
                "blocks of each; write version 2"
            )
        if pair in taken:
            raise ValueError(
                f"blocks '{taken[pair]}' and '{block.name}' are one to version 1, which calls a "
                "block NAME[NUMBER]; write version 2"
            )
        taken[pair] = block.name
    return {str(id): name for name, id in params.items()}, list(taken)


def _measure(scan: Scan) -> tuple[int, dict[str, float]]:
    """How many records a scan takes, and the scale of each metric by its key in the JSON."""
    count, largest = 0, dict.fromkeys(COLUMNS, 0.0)
    for place in range(len(scan.sequences)):
        numbers = scan.sequence(place)
        count += int((~np.isnan(numbers["activation"])).sum())
        for name in COLUMNS:
            largest[name] = max(largest[name], float(np.nanmax(numbers[name], initial=0)))
    if scan.version == 1:
        return count, {key: scan.about.get(key, 1.0) for key in SCALES.values()}
    return count, {SCALES[name]: largest[name] / LARGEST or 1.0 for name in COLUMNS}


def _records(
    numbers: dict[str, np.ndarray], first: int, pairs: list[tuple[int, int]], scales: dict
) -> np.ndarray:
    """The records of a sequence that begins at token `first`: token by token."""
    tokens, columns = np.nonzero(~np.isnan(numbers["activation"]))
    params, places = np.array(pairs, dtype=np.uint16).reshape(-1, 2).T
    records = np.empty(len(tokens), dtype=RECORD)
    records["token_idx"] = tokens + first
    records["param_id"], records["block_idx"] = params[columns], places[columns]
    for name, column in COLUMNS.items():
        values = numbers[name][tokens, columns] / np.float64(scales[SCALES[name]])
        records[column] = np.rint(values)
    return records
