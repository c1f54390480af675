"""Captions that people bring: a file of prompts, or one file beside each video."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from rcm_megatron.errors import InputError
from rcm_megatron.text import TextError, read_lines, read_text


class CaptionError(InputError):
    """A video without a usable caption; the message says what was looked for."""


def read_prompts(path: Path) -> list[str]:
    """The prompts of a `.txt` file (one a line, empty lines left out) or a `.jsonl` file (`{"prompt": …}` a line).

    InputError names the file, and the first line that is wrong.
    """
    ending = path.suffix.lower()
    if ending not in (".txt", ".jsonl"):
        raise InputError(f"got --prompts {path}, need a .txt or .jsonl file; rename or convert it")
    try:
        lines = read_lines(path)
    except TextError as error:
        raise InputError(f"--prompts {error}") from error
    plain = ending == ".txt"
    prompts = [line.strip() for line in lines if line.strip()] if plain else list(_json_prompts(path, lines))
    if not prompts:
        raise InputError(f"--prompts {path} holds no prompt, need at least one")
    return prompts


def _json_prompts(path: Path, lines: list[str]) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise InputError(f"--prompts {path}, line {number}: no JSON ({error})") from error
        prompt = entry.get("prompt") if isinstance(entry, dict) else None
        if not _is_text(prompt):
            raise InputError(f'--prompts {path}, line {number}: got {line.strip():.80}, need {{"prompt": "some text"}}')
        yield prompt.strip()


def read_caption(video: Path) -> str:
    """The caption in `<name>.txt`, or in "caption" of `<name>.json`, beside `<name>.<video's ending>`.

    Raises CaptionError where there is none that can be read.
    """
    text, structured = video.with_suffix(".txt"), video.with_suffix(".json")
    try:
        if text.is_file():
            caption = read_text(text)
        elif structured.is_file():
            entry = json.loads(read_text(structured))
            caption = entry.get("caption") if isinstance(entry, dict) else None
        else:
            raise CaptionError(f"no caption; need {text.name}, or {structured.name} with a caption in it")
    except json.JSONDecodeError as error:
        raise CaptionError(f"the caption beside it cannot be read: {structured.name}: no JSON ({error})") from error
    except TextError as error:
        raise CaptionError(f"the caption beside it cannot be read: {error}") from error
    if not _is_text(caption):
        raise CaptionError(
            f'the caption is empty or no text; write one into {text.name}, or "caption" of {structured.name}'
        )
    return " ".join(caption.split())


def _is_text(value: object) -> bool:
    """Whether it is a string with something in it. JSON's `"\\ud83d"`, half a character, cannot be stored."""
    return isinstance(value, str) and bool(value.strip()) and not any("\ud800" <= char <= "\udfff" for char in value)
