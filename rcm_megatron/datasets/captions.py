"""Captions for a dataset that is to be built: a file of prompts, or one file beside each video."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from rcm_megatron.data.manifest import DatasetError


class CaptionError(ValueError):
    """A video without a usable caption; the message says what was looked for."""


def read_prompts(path: Path) -> list[str]:
    """The prompts of a `.txt` file (one a line, empty lines left out) or a `.jsonl` file (`{"prompt": …}` a line).

    DatasetError names the first line that is wrong.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise DatasetError(f"got --prompts {path}, need a .txt or .jsonl file; rename or convert it")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"--prompts {path} cannot be read: {error}") from error
    plain = path.suffix == ".txt"
    prompts = [line.strip() for line in lines if line.strip()] if plain else list(_json_prompts(path, lines))
    if not prompts:
        raise DatasetError(f"--prompts {path} holds no prompt, need at least one")
    return prompts


def _json_prompts(path: Path, lines: list[str]) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise DatasetError(f"{path}, line {number}: no JSON ({error})") from error
        prompt = entry.get("prompt") if isinstance(entry, dict) else None
        if not isinstance(prompt, str) or not prompt.strip():
            raise DatasetError(f'{path}, line {number}: got {line.strip():.80}, need {{"prompt": "some text"}}')
        yield prompt.strip()


def read_caption(video: Path) -> str:
    """The caption in `<name>.txt`, or in "caption" of `<name>.json`, beside `<name>.<video's ending>`."""
    text, structured = video.with_suffix(".txt"), video.with_suffix(".json")
    try:
        if text.is_file():
            caption = text.read_text(encoding="utf-8")
        elif structured.is_file():
            entry = json.loads(structured.read_text(encoding="utf-8"))
            caption = entry.get("caption") if isinstance(entry, dict) else None
        else:
            raise CaptionError(f"no caption; need {text.name}, or {structured.name} with a caption in it")
    except (OSError, ValueError) as error:
        if isinstance(error, CaptionError):
            raise
        raise CaptionError(f"the caption beside it cannot be read: {error}") from error
    if not isinstance(caption, str) or not caption.strip():
        raise CaptionError(f'the caption is empty; write one into {text.name}, or "caption" of {structured.name}')
    return " ".join(caption.split())
