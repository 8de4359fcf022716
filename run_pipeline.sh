#!/usr/bin/env bash
# The one door: sets up .venv when it is missing, then runs the pipeline. ./run_pipeline.sh --help
set -euo pipefail
cd "$(dirname "$0")"
for argument in "$@"; do # help needs nothing installed
  case $argument in -h | --help) exec "${PYTHON:-python3}" -m flows --help ;; esac
done
source ./setup.sh
exec .venv/bin/python -m flows "$@"
