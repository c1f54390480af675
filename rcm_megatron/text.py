"""Text that people bring: files in UTF-8, with or without a byte order mark, whose lines end at \\n or \\r\\n; names of files."""

from __future__ import annotations

import codecs
from pathlib import Path

from rcm_megatron.errors import InputError

_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


class TextError(InputError):
    """A text file that is missing, or not in UTF-8; the message names it."""


def read_text(path: Path) -> str:
    """What the file says, without a byte order mark. TextError if it cannot be read as UTF-8."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TextError(f"{path} cannot be read: {error.strerror}; check the path") from error
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), None)
    if encoding is None and b"\0" in data:
        encoding = "bytes of value 0, as UTF-16 and binary files have them"
    if encoding:
        raise TextError(f"{path}: got {encoding}, need UTF-8; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        bad, line = data[error.start], data.count(b"\n", 0, error.start) + 1
        raise TextError(f"{path}, line {line}: got the byte {bad:#04x}, need UTF-8; save it as UTF-8") from error


def read_lines(path: Path) -> list[str]:
    """The lines of a text file without their ends; TextError as `read_text`.

    str.splitlines would also end a line at U+2028, U+0085, \\v and \\f, which captions of language models and web pages hold.
    """
    lines = [line.removesuffix("\r") for line in read_text(path).split("\n")]
    return lines if lines[-1] else lines[:-1]


def printable(name: str) -> str:
    """A name of a file as it can be shown and stored: bytes of it that are not UTF-8 become `\\xe9`."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def is_utf8(name: str) -> bool:
    """Whether a name of a file, as Python decodes it, is UTF-8 on the disk."""
    return printable(name) == name
