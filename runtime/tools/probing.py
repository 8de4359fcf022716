"""Finds out which layers of the sandbox hold on this machine, by trying each in a child.

A layer counts only if something that it forbids then fails: kernels, containers and their policies
differ too much to go by version numbers.
"""

import os
import socket
from collections.abc import Callable, Sequence

from runtime.tools import landlock, namespaces, seccomp
from runtime.tools.kernel import fork_into
from runtime.tools.sandbox import LAYERS, MEBIBYTE, Limits, Protection, address_space, set_limits


def probe(wanted: Sequence[str], scratch_mb: int) -> Protection:
    """Which of the wanted layers hold, each tried in a child of this process."""
    trials: dict[str, Callable[[], bool]] = {
        "user": _user_holds,
        "limits": _limits_hold,
        "seccomp": _seccomp_holds,
        "landlock": _landlock_holds,
        "namespaces": lambda: _namespaces_hold(scratch_mb),
    }
    held = tuple(layer for layer in LAYERS if layer in wanted and _in_child(trials[layer]))
    return Protection(held, landlock.abi() if "landlock" in held else 0)


def _in_child(trial: Callable[[], bool]) -> bool:
    """Whether a trial comes out true in a child; failing to do what it tries is false."""
    child = os.fork()
    if child == 0:
        held = False
        try:
            held = trial()
        except (OSError, AttributeError, KeyError):  # the system does not know, or does not allow
            held = False
        finally:
            os._exit(0 if held else 1)
    return os.waitpid(child, 0)[1] == 0


def _user_holds() -> bool:
    try:
        os.setuid(0)
    except PermissionError:
        return os.geteuid() != 0
    return False


def _limits_hold() -> bool:
    set_limits(Limits(memory_mb=64), used=address_space(), runs_commands=False)
    try:
        bytearray(256 * MEBIBYTE)
    except MemoryError:
        return True
    return False


def _seccomp_holds() -> bool:
    seccomp.apply_filter(seccomp.compute_filter())
    try:
        os.open("/", os.O_RDONLY)
    except PermissionError:
        return True
    return False


def _landlock_holds() -> bool:
    landlock.restrict(landlock.ruleset(landlock.abi(), {}))
    try:
        os.listdir("/")
    except PermissionError:
        return True
    return False


def _namespaces_hold(scratch_mb: int) -> bool:
    namespaces.enter(scratch_mb)
    inner = fork_into(namespaces.NEW_PROCESSES)
    if inner == 0:
        os._exit(0 if os.getpid() == 1 else 1)
    alone = os.waitpid(inner, 0)[1] == 0
    return alone and not os.path.exists("/proc") and len(socket.if_nameindex()) <= 1
