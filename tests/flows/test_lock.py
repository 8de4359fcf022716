"""Each test tries to break one promise of the pipeline's lock, with real processes."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

import flows.lock
from flows.lock import LOCK_HELD, RECORD_BYTES, Held, Holder, PipelineLock, ask_to_stop, started_at

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
DEADLINE_S = 60.0  # only a test that fails waits so long

HOLD = """
import functools, signal, sys
from pathlib import Path
from flows.lock import LOCK_HELD, Held, PipelineLock
say = functools.partial(print, "say", flush=True)
path, mode, on_sigterm = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, signal.SIG_IGN if on_sigterm == ["go on"] else lambda *_: sys.exit())
try:
    with PipelineLock(path, "run --stage distill", mode, say) as lock:
        print("held", flush=True)
        sys.stdin.readline()
except Held as refusal:
    print("refused", refusal, flush=True)
    sys.exit(LOCK_HELD)
"""
EXEC_CHILD = """
import subprocess, sys
from pathlib import Path
from flows.lock import PipelineLock
with PipelineLock(Path(sys.argv[1]), "parent"):
    child = subprocess.Popen([sys.executable, "-c", "input()"], close_fds=False)  # keeps our stdin
    print(child.pid, flush=True)
    child.wait()
"""


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen]]:
    """Start Python code in a process of its own; whatever still lives at the end is killed."""
    started: list[subprocess.Popen] = []
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}

    def start_one(code: str, *arguments: object) -> subprocess.Popen:
        command = [sys.executable, "-c", code, *map(str, arguments)]
        started.append(subprocess.Popen(command, env=ENVIRONMENT, **pipes))
        return started[-1]

    yield start_one
    for process in started:
        process.kill()
        process.stdin.close()  # a grandchild that reads it ends, too
        process.stdout.close()
        process.wait(DEADLINE_S)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / ".pipeline.lock"


def line(process: subprocess.Popen) -> str:
    return process.stdout.readline().strip()


def hold(start: Callable, path: Path, *on_sigterm: str) -> subprocess.Popen:
    """Start a process that has the lock when this returns, and keeps it until told to end."""
    process = start(HOLD, path, "refuse", *on_sigterm)
    assert line(process) == "held"
    return process


def refusal(path: Path, mode: str = "refuse", patience_s: float = DEADLINE_S) -> str:
    """Try to take a lock that another process holds; gives the message."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Held) as error:
        patch.setattr(flows.lock, "NAMING_S", 0.1)  # not long for a name that the file never holds
        PipelineLock(path, "second", mode, [].append, patience_s).__enter__()
    return str(error.value)


def fork(action: Callable[[], None]) -> int:
    """Do something in a forked child of this very process, without exec; gives its pid."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(0)  # never on into the tests
    return child


def test_of_twenty_simultaneous_starts_one_holds_and_all_others_name_its_pid(start, path):
    processes = [start(HOLD, path, "refuse") for _ in range(20)]
    lines = {process: line(process) for process in processes}
    (winner,) = [process for process in processes if lines[process] == "held"]
    for process in set(processes) - {winner}:
        assert f": pid {winner.pid} of" in lines[process]
        assert process.wait(DEADLINE_S) == LOCK_HELD


def test_a_refusal_names_pid_command_since_and_what_can_be_done(start, path):
    holder = hold(start, path)
    since = datetime.fromisoformat(Holder.read(path).since).astimezone()
    parts = (f": pid {holder.pid} of", f"{since:%H:%M:%S}", ": run --stage distill", str(path))
    message = refusal(path)
    assert all(part in message for part in (*parts, "--wait", "--takeover"))


def test_a_refusal_waits_for_the_name_of_a_holder_that_has_not_written_it_yet(path, monkeypatch):
    with PipelineLock(path, "new"):
        name, dead = path.read_bytes(), replace(Holder.read(path), pid=1, started=-1)
        monkeypatch.setattr(time, "sleep", lambda _s: path.write_bytes(name))
        for before in (b"", dead.encode()):
            path.write_bytes(before)
            assert f"{path}: pid {os.getpid()} of" in refusal(path)


def test_a_killed_holder_frees_the_lock_and_the_next_start_knows_who_died(start, path):
    victim = hold(start, path)
    victim.kill()
    os.waitid(os.P_PID, victim.pid, os.WEXITED | os.WNOWAIT)  # a zombie, which is not alive either
    assert started_at(victim.pid) is None
    with PipelineLock(path, "next") as lock:
        assert (lock.previous.pid, lock.previous.command) == (victim.pid, "run --stage distill")


def test_waiting_says_once_who_holds_it_and_gets_it_after_the_release(start, path):
    holder = hold(start, path)
    waiter = start(HOLD, path, "wait")
    assert f"held by pid {holder.pid} of" in line(waiter)
    assert waiter.poll() is None
    holder.communicate("end\n", DEADLINE_S)
    assert line(waiter) == "held"  # the very next line, so it was said once


def test_waiting_can_be_interrupted(start, path):
    hold(start, path)
    waiter = start(HOLD, path, "wait")
    assert line(waiter).startswith("say waiting")
    waiter.send_signal(signal.SIGINT)
    assert waiter.wait(DEADLINE_S) == -signal.SIGINT


@pytest.mark.parametrize("pidfd", [True, False])
def test_takeover_stops_the_holder_and_gets_the_lock(start, path, pidfd, monkeypatch):
    if not pidfd:
        monkeypatch.delattr(os, "pidfd_open", raising=False)
    holder, said = hold(start, path), []
    with PipelineLock(path, "taker", "takeover", said.append) as lock:
        assert lock.previous is None  # it released the lock in good order
        assert Holder.read(path).pid == os.getpid()
    assert holder.wait(DEADLINE_S) == 0
    assert len(said) == 1 and f"sent SIGTERM to pid {holder.pid} of" in said[0]


def test_takeover_gives_up_on_a_holder_that_goes_on_and_never_kills_it(start, path):
    holder = hold(start, path, "go on")
    message = refusal(path, "takeover", patience_s=0.5)
    assert f"sent SIGTERM to pid {holder.pid} of" in message
    assert f"is held by pid {holder.pid} of" in message
    assert holder.poll() is None


@pytest.mark.parametrize("lie", [{"started": 1}, {"boot_id": "an earlier"}, {"host": "elsewhere"}])
def test_takeover_spares_a_process_that_does_not_match_the_record(start, path, lie):
    holder, sleeper = hold(start, path), start("import time; time.sleep(600)")
    truth = replace(Holder.read(path), pid=sleeper.pid, started=started_at(sleeper.pid))
    path.write_bytes(replace(truth, **lie).encode())
    message = refusal(path, "takeover")
    assert "--takeover cannot stop" in message and "Nothing was signalled" in message
    assert ("it is on another host" in message) == ("host" in lie)
    with pytest.raises(Held, match=f"--takeover cannot stop pid {sleeper.pid} of"):
        ask_to_stop(replace(truth, **lie))  # the last check before the signal, by itself
    assert sleeper.poll() is None and holder.poll() is None
    ask_to_stop(truth)  # but for the lie, it would have been stopped
    assert sleeper.wait(DEADLINE_S) == -signal.SIGTERM


@pytest.mark.skipif(os.getuid() != 0, reason="needs two users")
def test_takeover_of_another_users_run_says_whose_it_is(start):
    become_nobody = "import os, flows.lock\nos.setuid(65534)\n"
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to others
        Path(folder).chmod(0o755)
        path = Path(folder) / ".pipeline.lock"
        path.touch()
        path.chmod(0o666)
        holder = hold(start, path)
        taker = start(become_nobody + HOLD, path, "takeover")
        assert f"it is {Holder.read(path).user}'s and you are" in line(taker)
        assert taker.wait(DEADLINE_S) == LOCK_HELD
        assert holder.poll() is None


def garbled() -> list[bytes]:
    """Files that name nobody: of the wrong kind, edited by hand, or cut short."""
    good = Holder.this_process("x").encode()
    kinds = [b"", b"{", bytes(4096), b"\xff\xfe\x00", b"[1]", b'"x"', b"null", b"9" * 9999]
    edited = [good.replace(b'"pid": ', b'"pid": -'), good.replace(b'"x"', b'"y"'), good[:60]]
    return kinds + edited


@pytest.mark.parametrize("content", garbled(), ids=range(len(garbled())))
def test_a_garbled_file_does_not_keep_anyone_from_the_lock(path, content):
    path.write_bytes(content)
    with PipelineLock(path, "next") as lock:
        assert lock.previous is None
        assert Holder.read(path).pid == os.getpid()
        assert path.stat().st_size == RECORD_BYTES


@pytest.mark.parametrize("mode", ["refuse", "takeover"])
def test_a_garbled_file_of_a_living_holder_still_refuses(start, path, mode):
    holder = hold(start, path)
    for content in garbled():
        path.write_bytes(content)
        assert "a process that the file does not name" in refusal(path, mode)
    assert holder.poll() is None


def test_an_execed_child_does_not_keep_the_lock(start, path):
    parent = start(EXEC_CHILD, path)
    child = int(line(parent))
    parent.kill()
    parent.wait(DEADLINE_S)
    with PipelineLock(path, "next") as lock:
        assert lock.previous.pid == parent.pid
        os.kill(child, 0)  # it lives, and yet the lock is ours


def test_a_forked_child_that_leaves_the_block_does_not_free_its_parents_lock(path):
    with PipelineLock(path, "parent") as lock:
        child = fork(lambda: lock.__exit__(None, None, None))
        os.waitpid(child, 0)
        assert f"pid {os.getpid()} of" in refusal(path)
        assert "that is this very process" in refusal(path, "takeover")  # or it would stop itself


def test_a_forked_child_does_not_keep_the_lock_after_a_normal_end(path):
    with PipelineLock(path, "parent"):
        child = fork(signal.pause)
    try:
        with PipelineLock(path, "next") as lock:
            assert lock.previous is None
            assert os.waitpid(child, os.WNOHANG) == (0, 0)  # it lives, and yet the lock is ours
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_the_file_is_never_unlinked(start, path):
    path.touch()
    inode = path.stat().st_ino  # the path has this one only as long as the file lives
    for mode in ("refuse", "wait"):
        with PipelineLock(path, "next", mode):
            assert refusal(path)
    hold(start, path)
    with PipelineLock(path, "taker", "takeover", [].append):
        pass
    assert path.stat().st_ino == inode


def test_an_unknown_mode_is_refused_with_the_known_ones(path):
    with pytest.raises(ValueError, match="'kill' is unknown.*refuse.*wait.*takeover"):
        PipelineLock(path, "x", "kill")
