"""Landlock: a process gives up every file but a few, TCP, and signals to others, for good.

Needs no privilege. What is understood differs by the kernel's ABI: files from 1 (Linux 5.13),
moving between folders from 2, truncation from 3, TCP from 4, devices' ioctl from 5, signals and
abstract sockets from 6.
"""

import ctypes
import os
import stat
import struct
from collections.abc import Mapping

from runtime.tools.kernel import PR_SET_NO_NEW_PRIVS, prctl, syscall

EXECUTE, WRITE, READ, LIST = 1 << 0, 1 << 1, 1 << 2, 1 << 3
REMOVE_FOLDER, REMOVE_FILE, MAKE_FOLDER, MAKE_FILE = 1 << 4, 1 << 5, 1 << 7, 1 << 8
REFER, TRUNCATE = 1 << 13, 1 << 14
READ_ONLY = READ | LIST
SCRATCH = READ | LIST | WRITE | REMOVE_FOLDER | REMOVE_FILE | MAKE_FOLDER | MAKE_FILE | TRUNCATE
RUN = READ | EXECUTE

_FILES = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # ABI: count of the rights about files
_OF_A_FILE = EXECUTE | WRITE | READ | TRUNCATE  # the rest is for folders
_VERSION, _PATH_BENEATH = 1, 1


def abi() -> int:
    """What the kernel understands. Raises OSError where it has no Landlock."""
    return syscall("landlock_create_ruleset", 0, 0, _VERSION)


def ruleset(version: int, allowed: Mapping[str, int]) -> int:
    """An open file that stands for a set of rules: path -> rights beneath it, and nothing else.

    version: from `abi`. Raises OSError when the kernel refuses, or a path does not exist.
    """
    handled = (1 << _FILES[min(version, 5)]) - 1
    attributes = struct.pack("QQQ", handled, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    attributes = attributes[: 8 if version < 4 else 16 if version < 6 else 24]
    held = ctypes.create_string_buffer(attributes, len(attributes))
    rules = syscall("landlock_create_ruleset", ctypes.addressof(held), len(attributes), 0)
    for path, rights in allowed.items():
        _allow(rules, path, rights & handled)
    return rules


def restrict(rules: int) -> None:
    """Puts a set of rules on this process, for good; several add up to what all of them allow."""
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    syscall("landlock_restrict_self", rules, 0)


def _allow(rules: int, path: str, rights: int) -> None:
    opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not stat.S_ISDIR(os.fstat(opened).st_mode):
            rights &= _OF_A_FILE
        rule = struct.pack("=Qi", rights, opened)
        held = ctypes.create_string_buffer(rule, len(rule))
        syscall("landlock_add_rule", rules, _PATH_BENEATH, ctypes.addressof(held), 0)
    finally:
        os.close(opened)
