#!/usr/bin/env bash
# Installs into .venv if needed, lints, runs the tests, three files at a time. Arguments go to pytest: bash tests/run.sh tests/unit -k config
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/setup_venv.sh
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=1
ruff check .
ruff format --check .
# More than cores, for many tests wait (for SLURM, for a rank that is to hang); the long files come first in the tree's order.
[ $# -gt 0 ] || set -- --numprocesses=3 --dist=loadfile --no-loadscope-reorder
exec python -m pytest --durations=25 "$@" </dev/null
