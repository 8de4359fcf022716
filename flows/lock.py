"""One pipeline run at a time on a working copy.

The kernel's flock on `.pipeline.lock` decides who runs. It goes when its process ends, however it
ends, so no stale lock is ever left. The JSON in the file only tells people, and `--takeover`, who
the holder is. The file is never unlinked: a second run could lock a new file beside the first.

    with PipelineLock(root / ".pipeline.lock", shlex.join(sys.argv), "refuse") as lock:
        if lock.previous:
            print(f"the previous run ({lock.previous.describe()}) died; going on")

Covered: simultaneous starts on one machine; kill -9; a restart; exec'ed children (they do not
inherit the lock). Not covered: a child *forked without exec* shares the lock, so after a kill -9 of
the holder it stays held until that child ends, too (after a normal end it does not); a network
file system without locks (NFS mounted `nolock`), where each host sees only its own runs; somebody
deleting the file during a run (`git clean -x`); Windows, which has no flock.
"""

import contextlib
import errno
import fcntl
import functools
import json
import os
import pwd
import signal
import socket
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Literal, get_args

LOCK_HELD = 75  # exit code: EX_TEMPFAIL of sysexits.h, "try again later"

Mode = Literal["refuse", "wait", "takeover"]

RECORD_BYTES = 4096
COMMAND_CHARACTERS = 300  # each takes up to 12 bytes of the record
POLL_S = 0.2
NOTHING_SENT = "Nothing was signalled; end it yourself, or use --wait"
NAMING_S = 3.0  # a new holder has the flock a moment before its name is in the file


class Held(RuntimeError):
    """Another run holds the lock; the message says who, since when, and what can be done."""


@dataclass(frozen=True)
class Holder:
    """Who holds the lock, or held it last: what the lock file says, for people to read."""

    pid: int
    started: float  # tells a process from a later one of the same pid; see `started_at`
    boot_id: str  # "" where the system has none
    host: str
    user: str
    command: str
    since: str  # ISO 8601, local time with its offset from UTC

    @classmethod
    def read(cls, path: Path) -> "Holder | None":
        """Read who is named in a lock file; None when it names nobody or is missing or garbled."""
        try:
            with path.open("rb") as file:
                return cls._parse(file.read(RECORD_BYTES))
        except FileNotFoundError:
            return None

    @classmethod
    def _parse(cls, raw: bytes) -> "Holder | None":
        try:
            record = json.loads(raw)
            holder = cls(**{part.name: record[part.name] for part in fields(cls)})
        except (ValueError, KeyError, TypeError):  # free, empty, torn, or not ours
            return None
        return holder if holder.encode() == raw else None  # a torn one has a wrong checksum

    def encode(self) -> bytes:
        """Give the bytes that `read` accepts."""
        return _encode({"state": "held", **asdict(self)})

    @classmethod
    def this_process(cls, command: str) -> "Holder":
        """Describe the running process as the holder from now on."""
        pid, host, command = os.getpid(), socket.gethostname(), command[:COMMAND_CHARACTERS]
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        return cls(pid, started_at(pid), boot_id(), host, _user_name(), command, since)

    def describe(self, now: datetime | None = None) -> str:
        """Say it in a line: pid 7 of anna on host7, since 14:03:22 (12 min): ./run_pipeline.sh."""
        since = datetime.fromisoformat(self.since).astimezone()
        now = (now or datetime.now()).astimezone()
        clock = f"{since:%H:%M:%S}" if since.date() == now.date() else f"{since:%Y-%m-%d %H:%M:%S}"
        age = _duration((now - since).total_seconds())
        who = f"pid {self.pid} of {self.user} on {self.host}"
        return f"{who}, since {clock} ({age}): {self.command}"

    def may_be_running(self) -> bool:
        """Whether this very process may be alive; nothing is known of those on other hosts."""
        if self.host != socket.gethostname():
            return True
        found = started_at(self.pid)
        return found is not None and (self.boot_id, self.started) == (boot_id(), found)


@dataclass
class PipelineLock:
    """Hold the pipeline's lock for the length of a `with` block; raises Held when it is taken.

    path: the lock file, made when missing. command: what the user typed, to show to others.
    mode: what to do when another run holds the lock: "refuse", "wait" until it is free, or
    "takeover": ask the holder to stop (SIGTERM to its pid alone) and wait up to `patience_s`.
    say: told, in a sentence, what is waited for.

    `previous` is, once the lock is held, the last holder if it ended without releasing the lock
    (killed, or the machine went down; also one that a takeover ended), else None.
    """

    path: Path
    command: str
    mode: Mode = "refuse"
    say: Callable[[str], None] = functools.partial(print, flush=True)
    patience_s: float = 120.0
    previous: Holder | None = field(default=None, init=False)
    _fd: int = field(default=-1, init=False, repr=False)
    _owner_pid: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"lock mode {self.mode!r} is unknown; use one of {get_args(Mode)}")

    def __enter__(self) -> "PipelineLock":
        deadline = time.monotonic() + NAMING_S
        while not self._try():
            holder = Holder.read(self.path)
            if holder and holder.may_be_running():
                self._contend(holder.describe(), holder)
                break
            if time.monotonic() > deadline:
                self._contend(_unnamed(self.path, holder), None)
                break
            time.sleep(POLL_S)
        return self

    def __exit__(self, *_error: object) -> None:
        try:
            if os.getpid() == self._owner_pid:  # a forked child must not end its parent's hold
                _write(self._fd, _encode({"state": "free"}))
                fcntl.flock(self._fd, fcntl.LOCK_UN)  # for forked children, too
        finally:
            os.close(self._fd)

    def _try(self) -> bool:
        """Take the lock if it is free."""
        with contextlib.ExitStack() as undo:  # opened anew each time: it may have been deleted
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            undo.callback(os.close, fd)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            self.previous = Holder.read(self.path)
            _write(fd, Holder.this_process(self.command).encode())
            self._fd, self._owner_pid = fd, os.getpid()
            undo.pop_all()
        return True

    def _contend(self, who: str, holder: Holder | None) -> None:
        """Do what the mode says when the lock is taken; holder None: nobody that can be stopped."""
        if self.mode == "refuse":
            or_stop = ", or --takeover to stop it" if holder else ""
            advice = f"Use --wait to start when it has ended{or_stop}"
            raise Held(f"another run holds {self.path}: {who}. {advice}")
        if self.mode == "takeover" and holder is None:
            raise Held(f"--takeover cannot stop who holds {self.path}: {who}. {NOTHING_SENT}")
        if self.mode == "takeover":
            self._take_over(holder)
            return
        self.say(f"waiting for {self.path}, held by {who}")
        while not self._try():
            time.sleep(POLL_S)

    def _take_over(self, holder: Holder) -> None:
        """Ask the holder to stop and wait until the lock is free; raises Held when it is not."""
        try:
            ask_to_stop(holder)
        except Held:
            if self._try():  # it ended by itself meanwhile
                return
            raise
        sent = f"sent SIGTERM to {holder.describe()}"
        self.say(f"{sent}; waiting up to {self.patience_s:g} s for the lock to become free")
        deadline = time.monotonic() + self.patience_s
        while not self._try():
            if time.monotonic() > deadline:
                now = Holder.read(self.path)
                who = now.describe() if now else _unnamed(self.path, None)
                late = f"after {self.patience_s:g} s {self.path} is held by {who}"
                raise Held(f"{sent}, but {late}. Use --wait, or end it yourself")
            time.sleep(POLL_S)


def ask_to_stop(holder: Holder) -> None:
    """Send SIGTERM to exactly the process that `holder` describes, and to nothing else.

    Raises Held, having sent nothing, when it is this process, is on another host, is not alive
    (host, boot, pid and start time must all match), or belongs to another user.
    """
    refusal = f"--takeover cannot stop {holder.describe()}"
    if holder.host != (here := socket.gethostname()):
        raise Held(f"{refusal}: it is on another host, this is {here}. {NOTHING_SENT}")
    if holder.pid == os.getpid():
        raise Held(f"{refusal}: that is this very process, which already holds the lock")
    try:
        with contextlib.ExitStack() as undo:
            pidfd = _open_pidfd(holder.pid)
            if pidfd is not None:
                undo.callback(os.close, pidfd)
            if not holder.may_be_running():  # asked after opening: the pidfd's process is meant
                raise ProcessLookupError
            if pidfd is not None:
                signal.pidfd_send_signal(pidfd, signal.SIGTERM)
            else:
                os.kill(holder.pid, signal.SIGTERM)
    except ProcessLookupError as error:
        raise Held(f"{refusal}: that process does not run here. {NOTHING_SENT}") from error
    except PermissionError as error:
        why = f"it is {holder.user}'s and you are {_user_name()}"
        raise Held(f"{refusal}: {why}. {NOTHING_SENT}") from error


def _open_pidfd(pid: int) -> int | None:
    """Open a handle on one process, safe from reuse of its pid; None where there is no such."""
    if not hasattr(os, "pidfd_open"):
        return None
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EPERM):  # Linux < 5.3; a container's filter
            return None
        raise


def started_at(pid: int) -> float | None:
    """When a process started: clock ticks since boot on Linux, elsewhere seconds since 1970.

    None when there is no such process, or only a zombie (it has ended and holds nothing).
    """
    if sys.platform != "linux":
        import psutil  # not in the standard library, so not needed where /proc will do

        try:
            return psutil.Process(pid).create_time()
        except psutil.NoSuchProcess:
            return None
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    after_name = stat.rpartition(b")")[2].split()  # the name may hold blanks and parentheses
    return None if after_name[0] in (b"Z", b"X") else int(after_name[19])  # fields 3 and 22


def boot_id() -> str:
    """Name this run of the machine, since pids and start times begin anew with each; "" if none."""
    source = Path("/proc/sys/kernel/random/boot_id")
    return source.read_text().strip() if source.exists() else ""


def _user_name() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container run under a bare number
        return f"uid {os.getuid()}"


def _encode(record: dict) -> bytes:
    """JSON with a checksum, since a reader may overlap a write; of one size, to cover the last."""
    sealed = {**record, "check": zlib.crc32(json.dumps(record).encode())}
    return (json.dumps(sealed).ljust(RECORD_BYTES - 1) + "\n").encode()


def _write(fd: int, record: bytes) -> None:
    os.pwrite(fd, record, 0)
    os.ftruncate(fd, len(record))  # whatever longer text somebody had put there


def _unnamed(path: Path, last: Holder | None) -> str:
    guess = f"perhaps a child of {last.describe()}, which itself does not run here" if last else ""
    return f"{guess or 'a process that the file does not name'} (`fuser -v {path}` shows it)"


def _duration(seconds: float) -> str:
    for unit, unit_s in (("h", 3600), ("min", 60)):
        if seconds >= unit_s:
            return f"{seconds // unit_s:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
