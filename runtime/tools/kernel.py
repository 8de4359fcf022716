"""Linux by hand: the few system calls that Python has no name for, and their numbers.

`PyDLL` keeps the interpreter's lock over a call, as a call that makes a process needs. All of this
is looked up when it is first used; on other systems `machine` is empty and every layer is missing.
"""

import ctypes
import os
import platform
import signal
import sys
from collections.abc import Iterable
from functools import cache
from typing import Any

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38

AUDIT_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

# name: (x86_64, aarch64); None: the architecture has no such call. From the kernel's
# arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h.
NUMBERS: dict[str, tuple[int | None, int | None]] = {
    "access": (21, None),
    "arch_prctl": (158, None),
    "brk": (12, 214),
    "chdir": (80, 49),
    "clock_gettime": (228, 113),
    "clone": (56, 220),
    "clone3": (435, 435),
    "close": (3, 57),
    "copy_file_range": (326, 285),
    "dup": (32, 23),
    "dup2": (33, None),
    "dup3": (292, 24),
    "execve": (59, 221),
    "exit": (60, 93),
    "exit_group": (231, 94),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "fadvise64": (221, 223),
    "fchdir": (81, 50),
    "fcntl": (72, 25),
    "fstat": (5, 80),
    "fstatfs": (138, 44),
    "ftruncate": (77, 46),
    "futex": (202, 98),
    "getcwd": (79, 17),
    "getdents64": (217, 61),
    "getegid": (108, 177),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getpid": (39, 172),
    "getrandom": (318, 278),
    "gettid": (186, 178),
    "gettimeofday": (96, 169),
    "getuid": (102, 174),
    "ioctl": (16, 29),
    "landlock_add_rule": (445, 445),
    "landlock_create_ruleset": (444, 444),
    "landlock_restrict_self": (446, 446),
    "lseek": (8, 62),
    "lstat": (6, None),
    "madvise": (28, 233),
    "mkdir": (83, None),
    "mkdirat": (258, 34),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "mremap": (25, 216),
    "munmap": (11, 215),
    "newfstatat": (262, 79),
    "open": (2, None),
    "openat": (257, 56),
    "pivot_root": (155, 41),
    "poll": (7, None),
    "ppoll": (271, 73),
    "pread64": (17, 67),
    "prlimit64": (302, 261),
    "read": (0, 63),
    "readlink": (89, None),
    "readlinkat": (267, 78),
    "rename": (82, None),
    "renameat": (264, 38),
    "renameat2": (316, 276),
    "rmdir": (84, None),
    "rseq": (334, 293),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sched_getaffinity": (204, 123),
    "sched_yield": (24, 124),
    "set_robust_list": (273, 99),
    "set_tid_address": (218, 96),
    "sigaltstack": (131, 132),
    "stat": (4, None),
    "statfs": (137, 43),
    "statx": (332, 291),
    "sysinfo": (99, 179),
    "umask": (95, 166),
    "uname": (63, 160),
    "unlink": (87, None),
    "unlinkat": (263, 35),
    "utimensat": (280, 88),
    "write": (1, 64),
    "writev": (20, 66),
}


@cache
def machine() -> str:
    """x86_64 or aarch64 on Linux; empty where nothing here is known to hold."""
    found = platform.machine()
    return found if sys.platform == "linux" and found in AUDIT_ARCHITECTURE else ""


def number(name: str) -> int | None:
    """The number of a system call on this machine; None: it has none."""
    return NUMBERS[name][0 if machine() == "x86_64" else 1]


def numbers(names: Iterable[str]) -> list[int]:
    """The numbers of system calls, of those that this machine has."""
    return [found for found in map(number, names) if found is not None]


@cache
def libc() -> ctypes.PyDLL:
    """The C library of this process."""
    return ctypes.PyDLL(None, use_errno=True)


def check(result: int, what: str) -> int:
    """The result of a C call. Raises OSError with the reason when it is negative."""
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def syscall(name: str, *arguments: Any) -> int:
    """Does a system call by name. Raises OSError when it fails, or does not exist here."""
    found = number(name) if machine() else None
    if found is None:
        raise OSError(f"{name}: not on this machine")
    return check(libc().syscall(ctypes.c_long(found), *map(_as_long, arguments)), name)


def _as_long(argument: Any) -> Any:
    return ctypes.c_long(argument) if isinstance(argument, int) else argument


def prctl(option: int, value: Any = 0, pointer: Any = 0) -> None:
    """prctl(2). Raises OSError when it fails."""
    arguments = (_as_long(value), _as_long(pointer), ctypes.c_long(0), ctypes.c_long(0))
    check(libc().prctl(ctypes.c_int(option), *arguments), f"prctl {option}")


def fork_into(flags: int) -> int:
    """fork() with clone flags, such as a process namespace of its own; 0 in the child.

    For a process with one thread: the C library's own fork handlers are not run.
    """
    ctypes.pythonapi.PyOS_BeforeFork()
    made = _clone(flags)
    if made == 0:
        ctypes.pythonapi.PyOS_AfterFork_Child()
        return 0
    ctypes.pythonapi.PyOS_AfterFork_Parent()
    return check(made, "clone")


def fork_to_execute() -> int:
    """fork() for a child that becomes another program at once: Python is not told of it.

    A third cheaper than os.fork. For a process with one thread.
    """
    return check(_clone(0), "clone") if machine() else os.fork()


def _clone(flags: int) -> int:
    return libc().syscall(
        ctypes.c_long(number("clone")),
        ctypes.c_long(flags | signal.SIGCHLD),
        *[ctypes.c_long(0)] * 4,
    )
