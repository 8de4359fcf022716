"""Run a command that dies when the process that started it dies.

    python -m flows.child PROGRAM ARGUMENT...

Linux keeps the request over exec, so the command itself needs to know nothing of it. Killing a
pipeline with -9 therefore ends DVC and Prefect's server too. Elsewhere the command simply runs.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(command: list[str]) -> None:
    """Replace this process by the command."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the request took effect
            sys.exit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
