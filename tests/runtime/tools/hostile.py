"""A tool server with its language layer taken off: for attacks on what lies behind it.

`py` executes any Python, with modules loaded that an escaped program would wish for, and `bash`
knows perl. All else (fork, limits, Landlock, seccomp, namespaces, deadline) is the real server's.
"""

import ctypes
import errno
import fcntl
import gc
import json
import mmap
import os
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

from runtime.tools import __main__ as real
from runtime.tools import shell_commands
from runtime.tools.runners import RUNNERS, Runner

LOADED = {
    module.__name__: module
    for module in (
        *(ctypes, errno, fcntl, gc, mmap, os, resource, select, signal, socket, struct),
        *(subprocess, sys, threading, time),
    )
}


def execute(arguments, room):
    """Runs a program unrestricted; its `result` is the answer."""
    names = dict(LOADED, libc=ctypes.CDLL(None, use_errno=True), room=room)
    exec(arguments["code"], names)
    return json.loads(json.dumps(names.get("result"), default=str)), False


if __name__ == "__main__":
    socket.getaddrinfo("127.0.0.1", 80)  # loads what name look-ups load
    RUNNERS["py"] = Runner(lambda: None, execute, calls=1)
    shell_commands.COMMANDS["perl"] = shell_commands.Command(shell_commands.TEXT, dashes=False)
    shell_commands.KNOWN.append("perl")
    real.main(json.loads(sys.argv[1]))
