"""Small scans to write, read and break."""

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stages.formats.mscan.scan import METRICS, BadScan, Block, Scan
from stages.formats.mscan.writer import ScanWriter

BLOCKS = [
    Block(7, "model.layers.0.self_attn[1]", 0, "attention head", 64, 64),
    Block(2**32 - 1, "model.layers.1.mlp[3]", 1, "ffn group", 12, 4),
    Block(0, "model.embed_tokens", -1, "embedding rows", 0, 512),
]
ABOUT = {"data": ["wiki"], "seed": 3, "loss": 2.5}


@dataclass(frozen=True)
class Text:
    """A sequence to write: activation, gradient and taylor are (T, N) float32."""

    source: str
    tokens: list[str]
    activation: np.ndarray
    gradient: np.ndarray
    taylor: np.ndarray


def make_text(tokens: int, seed: int, blocks: int = len(BLOCKS)) -> Text:
    """A sequence with numbers as they are ordinarily: activations large, gradients tiny."""
    rng = np.random.default_rng(seed)
    size = (tokens, blocks)
    return Text(
        source=f"source-{seed}",
        tokens=[f" t{place}" for place in range(tokens)],
        activation=rng.lognormal(np.log(1e2), 2, size).astype(np.float32),
        gradient=rng.lognormal(np.log(1e-9), 2, size).astype(np.float32),
        taylor=rng.lognormal(np.log(1e-7), 2, size).astype(np.float32),
    )


TEXTS = [make_text(3, 0), make_text(1, 1), make_text(2, 2)]


def write_scan(path: Path, texts: list[Text] = TEXTS, blocks: list[Block] = BLOCKS) -> bytes:
    """Write a scan whole, and give its bytes."""
    with ScanWriter(path, "tiny-model", blocks, ABOUT) as writer:
        for text in texts:
            writer.add(**vars(text))
    return path.read_bytes()


def put(path: Path, content: bytes) -> None:
    """Write a new file: writing over one can wait for the disk, thousands of times."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def read_all(scan: Scan) -> list[dict[str, np.ndarray]]:
    """The numbers of all sequences."""
    return [scan.sequence(place) for place in range(len(scan.sequences))]


def assert_close_to(numbers: dict[str, np.ndarray], text: Text) -> None:
    """The numbers are those that were written, within what float16 keeps."""
    assert tuple(numbers) == METRICS
    for name, values in numbers.items():
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, getattr(text, name), rtol=2**-11, atol=0)


def assert_begins(scan: Scan, whole: Scan) -> int:
    """What a scan says is how another one begins, or the sequence is said to be damaged.

    Gives how many sequences could be read.
    """
    assert (scan.model, scan.about, scan.blocks) == (whole.model, whole.about, whole.blocks)
    assert scan.sequences == whole.sequences[: len(scan.sequences)]
    assert scan.complete or scan.problem
    intact = 0
    for place in range(len(scan.sequences)):
        try:
            numbers = scan.sequence(place)
        except BadScan as error:
            assert f"sequence {place} " in str(error)
            continue
        intact += 1
        for name, values in whole.sequence(place).items():
            assert np.array_equal(numbers[name], values)
    return intact


def harm(content: bytes, rng: random.Random) -> bytes:
    """Cut a file, flip some of its bits, or both; never nothing."""
    harmed = bytearray(content)
    kind = rng.randrange(3)
    if kind != 0:
        for _ in range(rng.choice((1, 1, 2, 3, 8))):
            harmed[rng.randrange(len(harmed))] ^= 1 << rng.randrange(8)
    if kind != 1 or harmed == content:
        del harmed[rng.randrange(len(harmed)) :]
    return bytes(harmed)
