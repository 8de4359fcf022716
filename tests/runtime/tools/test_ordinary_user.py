"""The same attacks and honest programs when the tools are used by an ordinary user.

Run as root, this file starts the other tests once more as `nobody`, in a mount namespace in which
that user can reach the interpreter (which may lie in root's home). Run as an ordinary user, they
were run as one already. The calculator's are left out: sympy is slow to load.
"""

import ctypes
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.tiny import REPOSITORY

FILES = ["test_attacks.py", "test_honest.py"]
NOBODY = 65534
NEW_MOUNTS, BIND, PRIVATE, RECURSIVE = 0x20000, 0x1000, 1 << 18, 0x4000


def reach(folders: list[Path]) -> None:
    """Makes folders below closed ones reachable for everybody, in this process's mounts alone."""
    libc = ctypes.CDLL(None, use_errno=True)

    def mount(source: str, target: str, kind: bytes | None, flags: int) -> None:
        made = libc.mount(source.encode(), target.encode(), kind, ctypes.c_ulong(flags), None)
        if made < 0:
            raise OSError(ctypes.get_errno(), f"mount {target}")

    if libc.unshare(NEW_MOUNTS) < 0:
        raise OSError(ctypes.get_errno(), "unshare")
    mount("none", "/", None, PRIVATE | RECURSIVE)
    for number, folder in enumerate(folders):
        closed = [path for path in folder.parents if path.stat().st_mode & 0o005 != 0o005]
        if not closed:
            continue
        kept = Path(f"/mnt/reach{number}")
        mount("tmpfs", "/mnt", b"tmpfs", 0)
        kept.mkdir()
        mount(str(folder), str(kept), None, BIND | RECURSIVE)
        mount("tmpfs", str(closed[-1]), b"tmpfs", 0)
        closed[-1].chmod(0o755)
        folder.mkdir(parents=True)
        mount(str(kept), str(folder), None, BIND | RECURSIVE)


def become_nobody() -> None:
    """In the child, before it becomes pytest."""
    reach([Path(sys.base_prefix), Path(sysconfig.get_path("purelib")), REPOSITORY])
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="the tests run as an ordinary user already")
def test_the_tools_hold_for_an_ordinary_user(tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("nobody", numbered=True)
    folder.chmod(0o777)
    files = [f"tests/runtime/tools/{name}" for name in FILES]
    options = [
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "not calculator",
        "--basetemp",
        "/tmp/of-nobody",
    ]
    command = [sys.executable, "-B", "-m", "pytest", *options, *files]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(REPOSITORY)}
    try:
        done = subprocess.run(
            command,
            cwd=REPOSITORY,
            env=environment,
            preexec_fn=become_nobody,
            capture_output=True,
            text=True,
            check=False,
        )
    except subprocess.SubprocessError:
        pytest.skip("this system does not let root make a mount namespace")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-300:]
