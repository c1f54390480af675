#!/usr/bin/env bash
# Installs into .venv if needed, lints, runs the tests, three files at a time. Arguments go to pytest: bash tests/run.sh tests/unit -k config
# PYTHON=python3.12 bash tests/run.sh: under another Python, in a folder of its own (.venv-3.12), so that .venv stays as it is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ -n "${PYTHON:-}" ] && [ -z "${VENV:-}" ]; then
    VENV=".venv-$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
    export VENV
fi
bash launch/setup_venv.sh
PATH="$(realpath -m "${VENV:-.venv}")/bin:$PATH"
export PATH OMP_NUM_THREADS=1
unset PYTHONDONTWRITEBYTECODE # hundreds of processes would compile what they import
ruff check .
ruff format --check .
# More than cores, for many tests wait (for SLURM, for a rank that is to hang); the long files come first in the tree's order.
[ $# -gt 0 ] || set -- --numprocesses=3 --dist=loadfile --no-loadscope-reorder
exec python -m pytest --durations=25 "$@" </dev/null
