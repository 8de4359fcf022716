"""The numbers of system calls are the kernel's, on both machines."""

import re
from pathlib import Path

import pytest

from runtime.tools.kernel import NUMBERS
from runtime.tools.seccomp import COMMANDS, COMPUTE

HEADERS = {
    0: Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    1: Path("/usr/include/asm-generic/unistd.h"),
}
OTHER_NAMES = {"newfstatat": "fstatat", "fadvise64": "fadvise64"}


@pytest.mark.parametrize("column", HEADERS)
def test_numbers_are_those_of_the_kernels_headers(column: int) -> None:
    if not HEADERS[column].exists():
        pytest.skip("the kernel's headers are not installed")
    text = HEADERS[column].read_text()
    known = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", text))
    for name, numbers in NUMBERS.items():
        found = known.get(name) or known.get(OTHER_NAMES.get(name, ""))
        assert found == (None if numbers[column] is None else str(numbers[column])), name


def test_code_that_computes_may_neither_open_nor_start_nor_signal_anything() -> None:
    forbidden = {
        "open",
        "openat",
        "execve",
        "clone",
        "clone3",
        "kill",
        "socket",
        "connect",
        "ioctl",
    }
    assert not forbidden & set(COMPUTE)
    assert not (forbidden - {"open", "openat", "execve"}) & set(COMMANDS)
    assert set(COMPUTE) | set(COMMANDS) <= set(NUMBERS)
