"""What an attack could reach if it got out: a folder, a port, a process, a secret.

`World` sets them up; `harm` says what of it an attack has reached.
"""

import os
import secrets
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import psutil

SECRET = "NANOFOUNDRY_SECRET"
COMMANDS = {"perl", "yes", "cat", "sort", "seq", "tac", "bc", "sed", "grep", "tee", "factor", "tr"}


class World:
    """Canaries for attacks; `with World() as world:` around the tools that are attacked."""

    def __enter__(self) -> "World":
        self.token = secrets.token_hex(16)
        self.began = time.time() - 1
        self.folder = Path(tempfile.mkdtemp(prefix="canary-"))
        self.folder.chmod(0o777)
        (self.folder / "secret").write_text(self.token)
        (self.folder / "secret").chmod(0o666)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.setblocking(False)
        user = 65534 if os.geteuid() == 0 else None  # whom a server of root's becomes
        self.victim = subprocess.Popen(["/bin/sleep", "600"], user=user)
        os.environ[SECRET] = self.token
        return self

    def __exit__(self, *_: object) -> None:
        os.environ.pop(SECRET, None)
        self.victim.kill()
        self.victim.wait()
        self.listener.close()
        for path in self.folder.iterdir():
            path.unlink()
        self.folder.rmdir()

    def fill(self, text: str) -> str:
        """An attack's text with the places of this world in it."""
        text = text.replace("CANARY", str(self.folder)).replace("PORT", self.port)
        return text.replace("VICTIM", str(self.victim.pid))

    @property
    def port(self) -> str:
        return str(self.listener.getsockname()[1])

    def harm(self) -> list[str]:
        """What has been changed or reached, in words."""
        found = []
        if sorted(path.name for path in self.folder.iterdir()) != ["secret"]:
            found.append(f"the folder has {sorted(path.name for path in self.folder.iterdir())}")
        elif (self.folder / "secret").read_text() != self.token:
            found.append("the secret file was changed")
        if self.victim.poll() is not None:
            found.append("the victim is dead")
        try:
            self.listener.accept()
            found.append("somebody connected")
        except BlockingIOError:
            pass
        found += [str(path) for path in Path("/tmp").glob("nanofoundry-sys*")]
        found += [str(path) for path in Path("/tmp").glob("nanofoundry-perl*")]
        return found

    def orphans(self) -> list[str]:
        """Processes of tools that have lost their parent since this world began."""
        found = []
        for process in psutil.process_iter(["ppid", "name", "cmdline", "create_time", "status"]):
            seen = process.info
            ours = "runtime.tools" in " ".join(seen["cmdline"] or []) or seen["name"] in COMMANDS
            if seen["status"] == psutil.STATUS_ZOMBIE:  # ended; init has yet to notice
                continue
            if ours and seen["ppid"] == 1 and seen["create_time"] >= self.began:
                found.append(f"{process.pid} {seen['name']} {seen['cmdline']}")
        return found
