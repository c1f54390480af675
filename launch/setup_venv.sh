#!/usr/bin/env bash
# Makes or updates VENV (.venv at the repository root) from requirements.txt; nothing happens when it is up to date.
# PYTHON=/path/to/python3.12 picks the interpreter.
set -euo pipefail

# One function, so that bash has read all of it before it starts: the file may change under a long installation.
main() {
    cd "$(dirname "${BASH_SOURCE[0]}")/.."
    unset PYTHONPATH PYTHONHOME # pip takes packages of a site's module that are in the former for installed ones

    venv="$(realpath -m "${VENV:-.venv}")"
    python="${PYTHON:-python3}"
    got="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || echo "none: '$python' does not run")"
    if ! "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "setup_venv: got Python version $got; need 3.11 or newer with venv;" \
            "install it (Debian: apt-get install python3 python3-venv) or set PYTHON=/path/to/python3.11" >&2
        exit 2
    fi

    stamp="$(cat requirements.txt <("$python" -VV) <(pwd) | sha256sum | cut -d' ' -f1)"
    if [ -f "$venv/stamp" ] && [ "$(cat "$venv/stamp")" = "$stamp" ]; then
        exit 0
    fi

    echo "setup_venv: installing into $venv (Python $got)"
    # --no-compile: byte code of the few modules that are used is made below, and when others are used first
    "$python" -m venv --clear "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.txt
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --editable .
    # An environment may say that no byte code is written (images of containers do): every process would compile torch and Megatron anew.
    env -u PYTHONDONTWRITEBYTECODE "$venv/bin/python" -c "import rcm_megatron.training.trainer, rcm_megatron.inference.sample, diffusers"
    echo "$stamp" >"$venv/stamp" # last, so that an interrupted installation is made again
}
main
