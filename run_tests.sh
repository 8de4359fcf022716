#!/usr/bin/env bash
# The same set-up, then lint and every test, a process a core (tests compute in one thread each).
# Arguments go to pytest: ./run_tests.sh -m "not slow"
set -euo pipefail
cd "$(dirname "$0")"
source ./setup.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check .
exec .venv/bin/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder "$@"
