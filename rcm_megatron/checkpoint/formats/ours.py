"""This program's own formats: its names and all settings of the network, in safetensors or as Megatron's torch_dist."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from rcm_megatron.checkpoint.formats.base import Format
from rcm_megatron.checkpoint.writers import SafetensorsFolder, TorchDistContainer
from rcm_megatron.config import ModelConfig, as_dict
from rcm_megatron.errors import CheckpointError, nearest
from rcm_megatron.families.family import Family, Fields, Naming
from rcm_megatron.families.fields import checked

_SINCE = {"second_time": False}
"""Settings that folders from before they existed do not say -> what they were."""


def _read(settings: type[ModelConfig], config: Mapping[str, Any]) -> Fields:
    """Our own `config.json`: exactly the settings, each of them."""
    names = tuple(field.name for field in dataclasses.fields(settings))
    for name in config:
        if name not in names:
            raise CheckpointError(f"config.json: unknown field {name!r}{nearest(name, names)}")
    config = _SINCE | dict(config)
    for name in names:
        if name not in config:
            raise CheckpointError(f"config.json: missing field {name!r}; write the folder again with `convert`")
    return checked(config)


class Ours(Format):
    """Names of this program, which every family has."""

    def naming(self, family: Family) -> Naming:
        return dataclasses.replace(
            family.namings["internal"],
            is_config=lambda config: "_class_name" not in config and {"hidden_size", "num_heads"} <= config.keys(),
            read_config=lambda config, shapes: _read(family.settings, config),
            write_config=as_dict,
        )


class TorchDist(Ours):
    """Told from its files, not from its keys, which are those of `internal`."""

    def naming(self, family: Family) -> Naming:
        return dataclasses.replace(super().naming(family), is_used_by=lambda shapes: False)


INTERNAL = Ours("internal", SafetensorsFolder("model"))
TORCH_DIST = TorchDist("torch_dist", TorchDistContainer())
