"""Configurations that come with the program, by name: `wan2.1_t2v_14b_480p`, or words of it (`wan2.1-t2v-14b`)."""

from __future__ import annotations

import re
from pathlib import Path

from rcm_megatron.config.errors import ConfigError

FOLDER = Path(__file__).parents[2] / "model_configs"
"""Of a checkout."""


def config_path(text: str | Path) -> Path:
    """The file that ``text`` is the path of, else the shipped configuration that it names; ``text`` itself where there is neither.

    Raises ConfigError for words that are in the names of several."""
    path = Path(text)
    if path.suffix in (".yaml", ".yml") or len(path.parts) != 1 or path.exists():
        return path
    shipped = {file.stem: file for file in sorted(FOLDER.glob("*.yaml"))}
    if str(text) in shipped:
        return shipped[str(text)]
    found = [name for name in shipped if _words(str(text)) <= _words(name)]
    # what adds a word to another (a LoRA of it) is asked for by that word
    found = [name for name in found if not any(_words(other) < _words(name) for other in found)]
    if len(found) > 1:
        raise ConfigError(
            f"got {text}, which may be {', '.join(found[:-1])} or {found[-1]}; need one; write more of its name"
        )
    return shipped[found[0]] if found else path


def _words(name: str) -> set[str]:
    return set(re.split(r"[-_\s]+", name.lower()))
