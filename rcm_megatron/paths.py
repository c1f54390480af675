"""Paths that people write: `~` and `$NAME` in them, which a shell leaves alone after an `=`, in quotes and in files."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

from rcm_megatron.errors import InputError

_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")


class PathError(InputError):
    """A path that cannot be expanded, or cannot be a path; the message says what of it."""


def expanded(text: str) -> str:
    """``text`` with the home folder in place of a leading `~` or `~user`, and values in place of `$NAME` and `${NAME}`.

    PathError for a variable that is not set, a user that there is not, nothing at all, or characters that no path can have."""
    if not text.strip():
        raise PathError(f"got {text!r}, need a path")
    whole = os.path.expanduser(_VARIABLE.sub(_value, text))
    if whole.startswith("~"):
        raise PathError(
            f"got {text}, but there is no home folder of {whole.split('/')[0]}; write the path in full, or ./~..."
        )
    try:
        whole.encode()
    except UnicodeEncodeError:
        raise PathError(f"got {text!r}, which is not UTF-8, need a path that is; rename it") from None
    if "\0" in whole:
        raise PathError(f"got {text!r} with a character of code 0; need a path")
    return whole


def path_argument(text: str) -> Path:
    """Of a command line, for argparse: `--output=~/samples` reaches a program unexpanded.

    Raises ArgumentTypeError for one that the program does not take.
    """
    try:
        return Path(expanded(text))
    except PathError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _value(found: re.Match[str]) -> str:
    name = found[1] or found[2]
    if name not in os.environ:
        raise PathError(f"got {found.string}, but ${name} is not set; set it, or write the path in full")
    return os.environ[name]
