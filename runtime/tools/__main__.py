"""`python -m runtime.tools SETTINGS`: the fork server of the tools; `Tools` starts it.

It loads what the tools need, leaves root, tries the layers of the sandbox, moves into namespaces,
says on the link what protects, and then serves calls.
"""

import gc
import json
import os
import shutil
import socket
import sys
import tempfile
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from runtime.tools import frames, namespaces
from runtime.tools.probing import probe
from runtime.tools.runners import RUNNERS, Room, cut
from runtime.tools.sandbox import Limits, Protection, address_space, leave_root, prepared
from runtime.tools.server import Server
from runtime.tools.worker import Answer

LONGEST_MESSAGE = 400  # characters
# These carry words that were chosen for the model; of others it is told the kind as well.
_PLAIN = ("Refused", "CommandFailed")


def answer(tool: str, arguments: dict[str, Any], room: Room) -> dict[str, Any]:
    """Runs a call in a worker; whatever goes wrong becomes the error that the model reads."""
    value, truncated, error = None, False, None
    try:
        value, truncated = RUNNERS[tool].run(arguments, room)
        value, too_long = cut(value, room.limits.output_chars)
        truncated = truncated or too_long
    except BaseException as failure:  # a program may raise anything, SystemExit too
        value, error = None, in_words(failure)
    return {"value": value, "error": error, "truncated": truncated}


def in_words(failure: BaseException) -> str:
    """What went wrong, and in which line of a program."""
    kind = type(failure).__name__
    if isinstance(failure, MemoryError):
        return "out of memory"
    try:
        message = str(failure)
    except BaseException:
        message = "?"  # an object of the program's own that cannot be written
    walked = traceback.walk_tb(failure.__traceback__)
    lines = [line for frame, line in walked if frame.f_code.co_filename == "<program>"]
    place = f" (line {lines[-1]})" if lines else ""
    text = message if kind in _PLAIN else f"{kind}: {message}" if message else kind
    return text[:LONGEST_MESSAGE].encode(errors="replace").decode() + place


def main(settings: dict[str, Any], answer: Answer = answer) -> None:
    """Serves until the parent has gone. settings: link (a file), names, limits, layers, unsafe."""
    link = socket.socket(fileno=settings["link"])
    limits, names = Limits(**settings["limits"]), tuple(settings["names"])
    for name in names:
        RUNNERS[name].warm()
    used = address_space()
    layers = settings["layers"]
    if "user" in layers:
        with suppress(OSError):  # not allowed: then the layer is missing, and said to be
            leave_root()
    protection = probe(layers, limits.scratch_mb)
    scratch = _scratch(protection, limits)
    refused = {name: protection.refuses(name) for name in names if protection.refuses(name)}
    refused = {} if settings["unsafe"] else refused
    gc.collect()
    gc.freeze()  # what is shared with the workers stays untouched by their collector
    shown = {"layers": protection.layers, "abi": protection.landlock_abi, "refused": refused}
    link.sendall(frames.pack({"ready": shown | {"scratch": str(scratch)}}))
    room = Room(scratch, prepared(protection, scratch), limits)
    try:
        Server(link, room, used, names, refused, answer).serve()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _scratch(protection: Protection, limits: Limits) -> Path:
    """Where scratch folders lie: in the server's own file system where it has one."""
    if "namespaces" in protection.layers:
        namespaces.enter(limits.scratch_mb)
        return namespaces.SCRATCH
    return Path(tempfile.mkdtemp(prefix="nanofoundry-tools-"))


if __name__ == "__main__":
    os.umask(0o077)
    main(json.loads(sys.argv[1]))
