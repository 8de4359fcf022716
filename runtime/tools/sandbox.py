"""The sandbox: what stands between a model's code and the machine, layer by layer.

A call runs in a worker: a process forked from a server that was started by `exec`, with an explicit
module path and nothing else in its environment, so that it holds none of the trainer's memory,
files or secrets. A worker of `py` serves one call; those of `calc` and `bash`, in which no
code of the model runs, serve many. Around a worker, where the system has them:

language    (calculator, python_policy, shell) keeps out mistakes and every known trick.
            Not: faults in the interpreter or in a C library.
process     and deadline: hanging, crashing, leaving something behind; the worker and all that it
            started is killed. Not: anything that is done before the deadline.
user        root's rights: a server of root's goes on as nobody. Not: what every user may do.
limits      (rlimits) using up memory, CPU time, open files; core dumps; writing large files.
            Not: reading, network.
seccomp     all system calls but a few: `calc` and `py` open no file, make no connection, start and
            signal nothing. Not: faults in those few calls of the kernel.
landlock    files other than the listed ones; by kernel version also TCP, and signals to others.
            Not: reading below /usr/lib, which commands of `bash` need.
namespaces  network, other processes, every file outside /usr, filling the disk from the scratch
            folder. Not: faults in the kernel.

None of it protects from a fault in the kernel, from timing and cache side channels, from another
process of the same user outside when `namespaces` is missing, or from a model that is *wrong*. For
code of strangers on a machine that matters, put a virtual machine around all of it.

Each layer is tried out in a child when the server starts: it counts only if what it forbids then
fails. `py` needs seccomp; `bash` needs seccomp, and Landlock or namespaces. What does not have what
it needs refuses to run, unless `unsafe` was asked for; `calc` needs none: nothing is executed.
"""

import ctypes
import math
import os
import resource
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from runtime.tools import landlock, seccomp
from runtime.tools.kernel import (
    PR_SET_DUMPABLE,
    PR_SET_PDEATHSIG,
    check,
    libc,
    machine,
    prctl,
)
from runtime.tools.shell import programs

LAYERS = ("user", "limits", "seccomp", "landlock", "namespaces")
NEEDED = {"py": ("seccomp",), "bash": ("seccomp",)}
_SIGKILL = 9
_NOBODY = 65534  # user and group
MEBIBYTE = 1 << 20
_LIBRARIES = ("/lib", "/lib64", "/etc/ld.so.cache")
_READABLE = ("/usr/lib", "/usr/lib64", "/usr/libexec", *_LIBRARIES)
_LOADERS = ("/lib64/ld-linux-x86-64.so.2", "/lib/ld-linux-aarch64.so.1")


@dataclass(frozen=True)
class Limits:
    """What one call may use.

    seconds: wall time; at the deadline everything that the call started is killed. memory_mb:
    address space on top of the interpreter's. output_chars: of the result's JSON, else it is cut.
    scratch_mb: all files of all calls together. at_once: calls that run at the same time.
    """

    seconds: float = 2.0
    memory_mb: int = 256
    output_chars: int = 4_000
    scratch_mb: int = 16
    at_once: int = 2

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"the limit {name} is {value}; it must be above 0")


@dataclass(frozen=True)
class Protection:
    """The layers that hold here.

    landlock_abi: 0 without Landlock. rules: open files of rules that were made ready.
    """

    layers: tuple[str, ...]
    landlock_abi: int = 0
    rules: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def missing(self) -> tuple[str, ...]:
        """The layers that do not hold."""
        return tuple(layer for layer in LAYERS if layer not in self.layers)

    def refuses(self, tool: str) -> str | None:
        """Why a tool must not run under these layers; None: it may."""
        lacking = [layer for layer in NEEDED.get(tool, ()) if layer not in self.layers]
        if tool == "bash" and not {"landlock", "namespaces"} & set(self.layers):
            lacking.append("landlock or namespaces")
        if not lacking:
            return None
        return f"{tool} does not run here: the sandbox has no {' and no '.join(lacking)}"

    @property
    def words(self) -> str:
        """What protects, in words."""
        held = ", ".join(["a process of its own", "a deadline", *self.layers])
        held = held.replace("landlock", f"landlock (ABI {self.landlock_abi})")
        return f"{held}; missing: {', '.join(self.missing) or 'nothing'}"


def leave_root() -> None:
    """From root to nobody, for good; an ordinary user stays who it is. Raises OSError."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(_NOBODY)
        os.setuid(_NOBODY)


def confine(
    protection: Protection, limits: Limits, tool: str, scratch: Path, used: int, calls: int
) -> None:
    """Shuts this process in, for good: the first thing that a worker does.

    calls: how many it serves, for the limit on CPU time, which is behind the deadline. used: bytes
    of address space that the interpreter has already. Raises OSError when a layer that held when it
    was tried does not hold now: the worker must end then.
    """
    os.setsid()
    if machine():
        prctl(PR_SET_PDEATHSIG, _SIGKILL)
        prctl(PR_SET_DUMPABLE, 0)
    if "limits" in protection.layers:
        set_limits(limits, used, runs_commands=tool == "bash")
        _limit(resource.RLIMIT_CPU, math.ceil(limits.seconds * calls) + 2)
    if "namespaces" in protection.layers:
        _drop_capabilities()
    if "landlock" in protection.layers:
        _restrict_files(protection, tool, scratch)


def confine_computing(protection: Protection) -> None:
    """The last step for a worker that runs no commands, when its files are as they will stay."""
    if "seccomp" in protection.layers:
        seccomp.apply_filter(seccomp.compute_filter())


def confine_command(protection: Protection, limits: Limits) -> None:
    """Shuts in a command of `bash`, in the process that is about to become it."""
    if machine():
        prctl(PR_SET_PDEATHSIG, _SIGKILL)
    if "limits" in protection.layers:
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
        _limit(resource.RLIMIT_AS, limits.memory_mb * MEBIBYTE)
    if "seccomp" in protection.layers:
        seccomp.apply_filter(seccomp.command_filter())


def set_limits(limits: Limits, used: int, runs_commands: bool) -> None:
    """Puts the rlimits on this process. RLIMIT_AS holds nothing on macOS."""
    _limit(resource.RLIMIT_AS, used + limits.memory_mb * MEBIBYTE)
    _limit(resource.RLIMIT_FSIZE, limits.scratch_mb * MEBIBYTE if runs_commands else 0)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_NOFILE, 64)
    if not runs_commands:
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))


def _limit(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    lower = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (lower, lower))


def prepared(protection: Protection, scratch: Path) -> Protection:
    """The protection with what can be made ready before any fork: rules for files, and filters.

    scratch: the folder that all scratch folders lie in.
    """
    if "seccomp" in protection.layers:
        seccomp.ready()
    if "landlock" not in protection.layers:
        return protection
    version = protection.landlock_abi
    shared = {path: landlock.READ_ONLY for path in _READABLE if os.path.exists(path)}
    files = shared | {path: landlock.RUN for path in [*map(str, programs()), *_LOADERS]}
    files = {path: rights for path, rights in files.items() if os.path.exists(path)}
    files |= {str(scratch): landlock.SCRATCH}
    rules = {"commands": landlock.ruleset(version, files), "nothing": landlock.ruleset(version, {})}
    return replace(protection, rules=rules)


def _restrict_files(protection: Protection, tool: str, scratch: Path) -> None:
    """No file at all, or for commands what is prepared for them, and one scratch folder of all."""
    if tool != "bash":
        landlock.restrict(protection.rules["nothing"])
        return
    landlock.restrict(protection.rules["commands"])
    own = {path: landlock.READ_ONLY | landlock.EXECUTE for path in ("/usr", *_LIBRARIES)}
    own = {path: rights for path, rights in own.items() if os.path.exists(path)}
    own[str(scratch)] = landlock.SCRATCH
    rules = landlock.ruleset(protection.landlock_abi, own)
    landlock.restrict(rules)
    os.close(rules)


def _drop_capabilities() -> None:
    """Gives up what the process may do inside its own user namespace."""
    header = ctypes.create_string_buffer(struct.pack("Ii", 0x20080522, 0))
    check(libc().capset(header, ctypes.create_string_buffer(24)), "capset")


def address_space() -> int:
    """Bytes of address space that this process has."""
    statistics = Path("/proc/self/statm")
    if not statistics.exists():
        return 1 << 30
    return int(statistics.read_text().split()[0]) * resource.getpagesize()
