"""Namespaces: a process that sees no network, no other process, and hardly any file.

`enter` is done once, by the fork server; what it starts inherits it:

- user: what follows needs no privilege of the real system
- network: only a loopback device that is down
- IPC and host name: none of the real system's
- mount: a new root with nothing but /usr, its links and the loader's cache, and a small private
  tmpfs for scratch folders, which is gone with the last process in it

`NEW_PROCESSES` is given to each worker's fork: it is the first process of a space of its own, so
that the kernel kills whatever it has started when it ends.
"""

import ctypes
import os
from contextlib import suppress
from pathlib import Path

from runtime.tools.kernel import PR_SET_DUMPABLE, check, libc, prctl, syscall

_NEW_MOUNTS, _NEW_HOST, _NEW_IPC = 0x00020000, 0x04000000, 0x08000000
_NEW_USER, NEW_PROCESSES, _NEW_NETWORK = 0x10000000, 0x20000000, 0x40000000
_BIND, _RECURSIVE, _PRIVATE = 0x1000, 0x4000, 1 << 18
_NO_SUID, _NO_DEVICES, _NO_EXECUTION = 2, 4, 8
_DETACH = 2

SEEN = ("/usr", "/bin", "/lib", "/lib64", "/lib32", "/etc/ld.so.cache")
SCRATCH = Path("/scratch")  # in the new root


def enter(scratch_mb: int) -> None:
    """Moves this process into namespaces of its own. Raises OSError where that is not allowed.

    The process must have one thread. Afterwards only SEEN and SCRATCH exist for it.
    """
    user, group = os.geteuid(), os.getegid()
    prctl(PR_SET_DUMPABLE, 1)  # /proc/self belongs to root otherwise, once the user was changed
    flags = _NEW_USER | _NEW_MOUNTS | _NEW_HOST | _NEW_IPC | _NEW_NETWORK
    check(libc().unshare(flags), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    prctl(PR_SET_DUMPABLE, 0)
    _new_root(scratch_mb)


def _new_root(scratch_mb: int) -> None:
    root = Path("/tmp")
    _mount("none", Path("/"), "", _RECURSIVE | _PRIVATE)
    _mount("tmpfs", root, "tmpfs", _NO_SUID | _NO_DEVICES, "size=64k,nr_inodes=64,mode=755")
    for seen in map(Path, SEEN):
        inside = root / seen.relative_to("/")
        if seen.is_symlink():
            inside.symlink_to(os.readlink(seen))
        elif seen.is_dir():
            inside.mkdir()
            _mount(str(seen), inside, "", _BIND | _RECURSIVE)
        elif seen.exists():
            inside.parent.mkdir(exist_ok=True)
            inside.touch()
            _mount(str(seen), inside, "", _BIND)
    scratch, old = root / SCRATCH.relative_to("/"), root / "old"
    scratch.mkdir()
    old.mkdir()
    options = f"size={scratch_mb}m,nr_inodes=2000,mode=700"
    _mount("tmpfs", scratch, "tmpfs", _NO_SUID | _NO_DEVICES | _NO_EXECUTION, options)
    _pivot(root, old)


def _pivot(root: Path, old: Path) -> None:
    syscall("pivot_root", *(ctypes.c_char_p(os.fsencode(path)) for path in (root, old)))
    os.chdir("/")
    check(libc().umount2(b"/old", _DETACH), "umount2 /old")
    with suppress(OSError):  # an empty folder is no way out
        os.rmdir("/old")


def _mount(source: str, target: Path, kind: str, flags: int, options: str = "") -> None:
    arguments = (source.encode(), os.fsencode(target), kind.encode() or None)
    made = libc().mount(*arguments, ctypes.c_ulong(flags), options.encode() or None)
    check(made, f"mount {target}")
