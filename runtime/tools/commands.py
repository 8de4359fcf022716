"""Runs a pipeline of checked commands: what a worker of `bash` does.

This process runs nothing but our code, and starts one child for each command; a child shuts itself
in and becomes its command. What the last one writes comes back. When enough was written all of them
are killed, and so they are with this process at the deadline. No command can start another, so
that none is left when all children have ended.
"""

import os
import selectors
import shutil
import signal
from pathlib import Path
from typing import Any

from runtime.tools.kernel import fork_to_execute
from runtime.tools.sandbox import Limits, Protection, confine_command
from runtime.tools.shell import is_failure, path_inside, pipeline
from runtime.tools.shell_words import Refused

# Letters are Unicode; order and messages are those of C, and need no further files to be loaded.
ENVIRONMENT = {"LC_CTYPE": "C.UTF-8", "TZ": "UTC0"}
LONGEST_ERRORS = 500  # bytes kept of what commands complain of


class CommandFailed(Exception):
    """A command that ended with a failure; the message is what it complained of."""


def run_commands(
    arguments: dict[str, Any], scratch: Path, protection: Protection, limits: Limits
) -> tuple[str, bool]:
    """What a command line prints, and whether that was cut. Raises Refused and CommandFailed.

    arguments: command, and perhaps files (name -> text) that are put into the scratch folder first.
    """
    commands = pipeline(arguments["command"])
    os.chdir(scratch)
    try:
        for name, text in arguments.get("files", {}).items():
            _write(path_inside(name), text)
        return _run(commands, protection, limits)
    finally:
        _empty(scratch)


def _run(commands: list[list[str]], protection: Protection, limits: Limits) -> tuple[str, bool]:
    """What the last command prints, and whether that was cut."""
    children, output, errors = _start(commands, protection, limits)
    try:
        written, complaints, cut = _read(output, errors, limits.output_chars * 4)
    finally:
        os.close(output)
        os.close(errors)
    if cut:  # else each has ended, or closed what it wrote to
        for child in children:
            os.kill(child, signal.SIGKILL)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    text = written.decode(errors="replace").removesuffix("\n")
    complaint = complaints.decode(errors="replace").replace("/usr/bin/", "").strip()
    if not cut and (complaint or not text) and is_failure(commands[-1], statuses[-1]):
        raise CommandFailed(complaint or f"{Path(commands[-1][0]).name} ended with {statuses[-1]}")
    if not cut and complaint and not text:
        raise CommandFailed(complaint)
    return text, cut


def _empty(folder: Path) -> None:
    """Leaves nothing for the next call. Raises OSError; the worker ends with it."""
    with os.scandir(folder) as found:
        for entry in found:
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)


def _write(name: str, text: str) -> None:
    path = Path(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise Refused(f"the file {name[:60]!r} cannot be written: {error.strerror}") from None


def _start(
    commands: list[list[str]], protection: Protection, limits: Limits
) -> tuple[list[int], int, int]:
    """Starts every command; gives process ids, and where to read output and errors."""
    errors, errors_in = os.pipe()
    before, children = os.dup(0), []  # the worker's own input is empty
    for arguments in commands:
        after, out = os.pipe()
        child = fork_to_execute()
        if child == 0:
            _become(arguments, (before, out, errors_in), protection, limits)
        children.append(child)
        os.close(before)
        os.close(out)
        before = after
    os.close(errors_in)
    return children, before, errors


def _become(
    arguments: list[str], files: tuple[int, int, int], protection: Protection, limits: Limits
) -> None:
    """Turns this child into a command, or ends it."""
    try:
        for target, file in enumerate(files):
            os.dup2(file, target)
        os.closerange(3, 64)
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        confine_command(protection, limits)
        os.execve(arguments[0], arguments, ENVIRONMENT | {"TMPDIR": os.getcwd()})
    except OSError as error:
        os.write(2, f"{Path(arguments[0]).name}: {error.strerror}\n".encode())
    finally:
        os._exit(126)


def _read(output: int, errors: int, most: int) -> tuple[bytes, bytes, bool]:
    """Reads output and complaints to their ends; stops where the output has `most` bytes."""
    kept = {output: bytearray(), errors: bytearray()}
    with selectors.DefaultSelector() as selector:
        for file in kept:
            selector.register(file, selectors.EVENT_READ)
        while selector.get_map() and len(kept[output]) <= most:
            for key, _ in selector.select():
                received = os.read(key.fd, 65_536)
                if not received:
                    selector.unregister(key.fd)
                kept[key.fd] += received
                del kept[errors][LONGEST_ERRORS:]
    return bytes(kept[output][:most]), bytes(kept[errors]), len(kept[output]) > most
