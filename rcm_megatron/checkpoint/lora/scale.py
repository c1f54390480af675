"""By what the product of two factors is scaled where no `.alpha` says it: peft's settings in a file's header, or beside it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rcm_megatron.checkpoint.sources import CheckpointSource
from rcm_megatron.errors import CheckpointError

_HEADER = "lora_adapter_metadata"
_BESIDE = "adapter_config.json"
_REFUSED = ("use_dora", "fan_in_fan_out", "megatron_config", "layer_replication")
"""Settings of peft that change what the factors mean."""


@dataclass(frozen=True)
class AdapterSettings:
    """``alpha`` None: nothing says it, the scale is 1."""

    alpha: float | None = None
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    by_root: bool = False
    """The scale is alpha over the root of the rank (rsLoRA, arXiv 2312.03732)."""

    def scale(self, module: str, rank: int) -> float:
        """Of a module, as peft finds it: its alpha by the first pattern that is an end of its name."""
        matches = (
            value for pattern, value in self.alpha_pattern.items() if re.fullmatch(rf"(.*\.)?({pattern})", module)
        )
        alpha = next(matches, self.alpha)
        return 1.0 if alpha is None else alpha / (math.sqrt(rank) if self.by_root else rank)


def read_settings(source: CheckpointSource, path: Path, root: str) -> AdapterSettings:
    """Those of the network whose keys begin with ``root``. Raises CheckpointError for settings of another method, or that are no JSON."""
    beside = (path if path.is_dir() else path.parent) / _BESIDE
    where = source.where
    try:
        if _HEADER in source.metadata:
            settings = json.loads(source.metadata[_HEADER])
            settings = {key.removeprefix(f"{root}."): value for key, value in settings.items()} if root else settings
        elif root.startswith("base_model") and beside.is_file():
            where, settings = str(beside), json.loads(beside.read_text())
        else:
            return AdapterSettings()
        return _checked(settings, where)
    except (ValueError, AttributeError, TypeError, OSError, re.error) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{where}: the adapter's settings cannot be read ({error}); need peft's JSON") from error


def _checked(settings: Mapping[str, Any], where: str) -> AdapterSettings:
    if refused := [name for name in _REFUSED if settings.get(name)]:
        raise CheckpointError(
            f"{where}: got {refused[0]}={settings[refused[0]]!r}; need a plain LoRA: merge it with its own program"
        )
    alpha = settings.get("lora_alpha")
    patterns = {name: float(value) for name, value in (settings.get("alpha_pattern") or {}).items()}
    return AdapterSettings(None if alpha is None else float(alpha), patterns, bool(settings.get("use_rslora")))
