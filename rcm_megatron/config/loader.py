"""YAML and `key.sub=value` overrides to frozen dataclasses, strictly: every value is type-checked, no key is ignored."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from rcm_megatron.config.describe import describe
from rcm_megatron.config.errors import ConfigError
from rcm_megatron.config.reading import read
from rcm_megatron.config.run import RunConfig
from rcm_megatron.config.shipped import config_path
from rcm_megatron.config.validate import problems_of
from rcm_megatron.config.yaml_text import Dumper, parse, parse_override
from rcm_megatron.text import TextError, read_text


def load_config(path: str | Path, overrides: Sequence[str] = (), *, world_size: int | None = None) -> RunConfig:
    """Read a run configuration, a path or a shipped one's name, and apply `overrides` ("trainer.log_every=10", "stages.0.steps=5").

    Raises ConfigError with every reason why it cannot run on ``world_size`` processes; without that number, with what is wrong within its
    sections alone, for a caller that goes on to change it."""
    data, problems = _overridden(_read(config_path(path)), overrides)
    unusable = list(_import_plugins(data))
    config, refused = read(RunConfig, data)
    if problems := [*problems, *unusable, *refused, *problems_of(config, world_size)]:
        raise ConfigError("\n".join(problems))
    return config


def _import_plugins(data: Mapping[str, Any]) -> Iterator[str]:
    """Import the modules that know more objectives before the rest is read; yields what is wrong with those that cannot be."""
    names = data.get("plugins")
    for index, name in enumerate(names if isinstance(names, list) else ()):
        try:
            importlib.import_module(str(name))
        except Exception as error:  # whatever the module does when it is imported
            reason = f"{type(error).__name__}: {error}"
            yield f"plugins.{index}={name} cannot be imported ({reason}); need a module of this environment: install its package"


def validate(config: RunConfig, world_size: int) -> None:
    """Raise ConfigError with every reason why `config`, made in whatever way, cannot run on `world_size` processes."""
    config, refused = read(RunConfig, as_dict(config))
    if problems := [*refused, *problems_of(config, world_size)]:
        raise ConfigError("\n".join(problems))


def _read(path: Path) -> dict[str, Any]:
    try:
        data = parse(read_text(path))
    except TextError as error:
        raise ConfigError(f"{error} (need a YAML file, or the name of one of model_configs/)") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: got {describe(data)}, need a mapping of configuration keys")
    return data


def apply_overrides(data: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `data` with each `key.sub=value` set; the value is read as YAML, a list is entered by its index. Raises ConfigError."""
    result, problems = _overridden(data, overrides)
    if problems:
        raise ConfigError("\n".join(problems))
    return result


def _overridden(data: Mapping[str, Any], overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """A copy with the overrides that can be set, and what is wrong with the others."""
    result, problems = _copy(data), []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            problems.append(f"override {override!r} is not key=value; write e.g. trainer.log_every=10")
            continue
        try:
            _set(result, key.split("."), parse_override(text))
        except ConfigError as error:
            problems.append(f"override {override!r}: {error}")
    return result, problems


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list | tuple) else value


def _set(node: Any, keys: Sequence[str], value: Any) -> None:
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(node, list):
            key = _index(node, key)
        elif not isinstance(node, dict):
            raise ConfigError(f"{'.'.join(keys[:depth])} is {describe(node)}, it has no keys")
        elif not last and node.get(key) is None:
            node[key] = {}
        if last:
            node[key] = value
        else:
            node = node[key]


def _index(items: list[Any], key: str) -> int:
    if key.isdigit() and int(key) < len(items):
        return int(key)
    raise ConfigError(f"got index {key!r} into a list of {len(items)}; use 0 to {len(items) - 1}")


def as_dict(config: Any) -> dict[str, Any]:
    """Plain data (dict, list, numbers, text) that `build` turns back into an equal object."""
    return _copy(dataclasses.asdict(config))


def to_yaml(config: Any) -> str:
    """The complete configuration, defaults included, as YAML that `load_config` reads back."""
    return yaml.dump(as_dict(config), Dumper=Dumper, sort_keys=False, width=110)
