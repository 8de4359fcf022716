"""Messages between processes: a length, a nonce, and JSON.

The nonce of an answer is the one that came with the question. A worker learns it only when it is
asked, so that what a call has left in the pipe can never be taken for the answer to the next one.
"""

import json
import os
import struct
from typing import Any

NONCE_BYTES = 16
LONGEST = 1 << 20  # bytes of a message
_HEADER = struct.Struct(f"!I{NONCE_BYTES}s")
NO_NONCE = bytes(NONCE_BYTES)


class BadFrame(ValueError):
    """Bytes that are no message, or not the expected one."""


def pack(message: Any, nonce: bytes = NO_NONCE) -> bytes:
    """A message as bytes."""
    body = json.dumps(message).encode()
    return _HEADER.pack(len(body), nonce) + body


class Inbox:
    """Bytes as they come in, taken out as messages of at most `longest` bytes."""

    def __init__(self, longest: int = LONGEST) -> None:
        self._bytes = bytearray()
        self._longest = longest

    def add(self, received: bytes) -> None:
        """Takes in what was read."""
        self._bytes += received

    @property
    def empty(self) -> bool:
        """Whether nothing is left over."""
        return not self._bytes

    def take(self) -> tuple[Any, bytes] | None:
        """The next message and its nonce; None while it is not all there. Raises BadFrame."""
        if len(self._bytes) < _HEADER.size:
            return None
        length, nonce = _HEADER.unpack_from(self._bytes)
        if length > self._longest:
            raise BadFrame(f"a message of {length} bytes; at most {self._longest}")
        end = _HEADER.size + length
        if len(self._bytes) < end:
            return None
        body = bytes(self._bytes[_HEADER.size : end])
        del self._bytes[:end]
        try:
            return json.loads(body, parse_constant=_refused), nonce
        except (ValueError, RecursionError) as error:
            raise BadFrame(f"not JSON: {error}") from None


def _refused(name: str) -> None:
    raise BadFrame(f"{name} is no JSON number")


def receive(file: int, inbox: Inbox) -> tuple[Any, bytes] | None:
    """Waits for the next message; None: the other side has gone."""
    while (message := inbox.take()) is None:
        received = os.read(file, 65_536)
        if not received:
            return None
        inbox.add(received)
    return message


def send(file: int, data: bytes) -> None:
    """Writes all of it."""
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]
