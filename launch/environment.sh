# shellcheck shell=bash
# Sourced by the launch scripts when the run's Python is the first in PATH (or CONTAINER has it). A site's modules put folders into
# PYTHONPATH, which come before an interpreter's own packages: another torch, yaml or rcm_kernels there would be the run's. It is kept,
# behind the run's own packages, only for an interpreter that has no torch without it.
own="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
own="$own:$own/kernels"
if [ -n "${CONTAINER:-}" ] || python -I -c 'import importlib.util as find, sys; sys.exit(not find.find_spec("torch"))' 2>/dev/null; then
    unset PYTHONHOME
    export PYTHONPATH="$own" PYTHONNOUSERSITE=1
else
    export PYTHONPATH="$own${PYTHONPATH:+:$PYTHONPATH}"
fi
