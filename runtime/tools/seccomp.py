"""seccomp: a process gives up every system call but a few, for good.

A filter is a small program for the kernel. Ours is an allow-list: wrong architecture or the x32
table kills the process; a listed call passes; everything else fails with EPERM. It is inherited
and nothing can take it off.

Two lists. COMPUTE is for `calc` and `py`, whose modules are loaded before: read and write what is
open already, and memory that cannot be executed; there is no way to open, connect, start, signal,
wait or sleep. COMMANDS is for a program that is started by `bash`: it may also open files (Landlock
and the mount namespace say which), and be started once; it cannot start or signal anything.
"""

import ctypes
import struct
from functools import cache
from typing import Any

from runtime.tools.kernel import (
    AUDIT_ARCHITECTURE,
    PR_SET_NO_NEW_PRIVS,
    PR_SET_SECCOMP,
    machine,
    number,
    numbers,
    prctl,
)

COMPUTE = """brk clock_gettime close exit exit_group futex getpid getrandom gettid gettimeofday
madvise mmap mprotect mremap munmap read rt_sigaction rt_sigprocmask rt_sigreturn sched_yield
sigaltstack write""".split()
COMMANDS = (
    COMPUTE
    + """access arch_prctl chdir copy_file_range dup dup2 dup3 execve faccessat faccessat2
fadvise64 fchdir fcntl fstat fstatfs ftruncate getcwd getdents64 getegid geteuid getgid getuid
lseek lstat mkdir mkdirat newfstatat open openat poll ppoll pread64 prlimit64 readlink
readlinkat rename renameat renameat2 rmdir rseq sched_getaffinity set_robust_list
set_tid_address stat statfs statx sysinfo umask uname unlink unlinkat utimensat writev""".split()
)

_MODE_FILTER = 2
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS = 1, 38
_NUMBER, _ARCHITECTURE, _THIRD = (
    0,
    4,
    32,
)  # the call, the machine, its third argument: offsets in struct seccomp_data
_X32 = 0x40000000
_PROT_EXEC = 4


def _step(code: int, value: int, then: int = 0, otherwise: int = 0) -> bytes:
    """One instruction: struct sock_filter."""
    return struct.pack("HBBI", code, then, otherwise, value)


_PASS, _REFUSE = _step(_RETURN, _ALLOW), _step(_RETURN, _ERRNO | _EPERM)


@cache
def compute_filter() -> bytes:
    """The filter for code that only computes: COMPUTE, and no memory that can be executed."""
    no_code = _step(_LOAD, _THIRD) + _step(_ANY_BIT, _PROT_EXEC, 0, 1) + _REFUSE + _PASS
    return _filter(
        b"".join(_if(found, no_code) for found in numbers(["mmap", "mprotect"])), COMPUTE
    )


@cache
def command_filter() -> bytes:
    """The filter for a command: COMMANDS; its limits it may read, not set; a thread is refused."""
    only_reading = b"".join(
        _step(_LOAD, half) + _step(_EQUAL, 0, 1, 0) + _REFUSE for half in (_THIRD, _THIRD + 4)
    )
    checked = _if(number("prlimit64"), only_reading + _PASS)
    return _filter(checked + _if(number("clone3"), _step(_RETURN, _ERRNO | _ENOSYS)), COMMANDS)


def apply_filter(program: bytes) -> None:
    """Puts a filter on this process, for good. Raises OSError where the kernel has no seccomp."""
    held, _ = _held(program)
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    prctl(PR_SET_SECCOMP, _MODE_FILTER, ctypes.addressof(held))


def ready() -> None:
    """Makes both filters, so that a child only has to put one on."""
    _held(compute_filter())
    _held(command_filter())


@cache
def _held(program: bytes) -> tuple[Any, Any]:
    """A filter where the kernel finds it (struct sock_fprog, and its steps), made once."""
    steps = ctypes.create_string_buffer(program, len(program))
    pointer = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(steps))
    return ctypes.create_string_buffer(pointer, len(pointer)), steps


def _filter(checked: bytes, allowed: list[str]) -> bytes:
    start = _step(_LOAD, _ARCHITECTURE) + _step(_EQUAL, AUDIT_ARCHITECTURE[machine()], 1, 0)
    start += _step(_RETURN, _KILL) + _step(_LOAD, _NUMBER)
    if machine() == "x86_64":
        start += _step(_AT_LEAST, _X32, 0, 1) + _step(_RETURN, _KILL)
    return start + checked + b"".join(_if(found, _PASS) for found in numbers(allowed)) + _REFUSE


def _if(found: int | None, then: bytes) -> bytes:
    """Steps for one system call, which end in a return; none where it does not exist."""
    return b"" if found is None else _step(_EQUAL, found, 0, len(then) // 8) + then
