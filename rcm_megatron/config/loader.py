"""YAML and `key.sub=value` overrides to frozen dataclasses, strictly: every value is type-checked, no key is ignored."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from rcm_megatron.config.errors import ConfigError
from rcm_megatron.config.run import RunConfig
from rcm_megatron.text import TextError, read_text

T = TypeVar("T")


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-6 as a number (YAML 1.1 wants 1.0e-6) and refuses a key given twice."""


class _Dumper(yaml.SafeDumper):
    """SafeDumper that writes short sequences on one line."""


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    twice = [key for i, key in enumerate(keys) if key in keys[:i]]
    if twice:
        raise ConfigError(f"line {node.start_mark.line + 1}: key {twice[0]!r} is given twice; keep one")
    return loader.construct_mapping(node, deep=True)


_FLOAT = re.compile(r"^[-+]?(\d+\.\d*|\.\d+|\d+)([eE][-+]?\d+)?$")
_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_Dumper.add_representer(
    list,
    lambda dumper, items: dumper.represent_sequence(
        "tag:yaml.org,2002:seq", items, flow_style=not any(isinstance(item, dict) for item in items)
    ),
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run configuration and apply `overrides` ("trainer.log_every=10", "stages.0.steps=5")."""
    return build(RunConfig, apply_overrides(_read(Path(path)), overrides))


def _read(path: Path) -> dict[str, Any]:
    try:
        data = _parse(read_text(path))
    except TextError as error:
        raise ConfigError(f"{error} (need a YAML file, e.g. one of model_configs/)") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: got {_describe(data)}, need a mapping of configuration keys")
    return data


def _parse(text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {' '.join(str(error).split())}") from None


def apply_overrides(data: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `data` with each `key.sub=value` set; the value is read as YAML, a list is entered by its index."""
    result = _copy(data)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {override!r} is not key=value; write e.g. trainer.log_every=10")
        try:
            _set(result, key.split("."), _parse(text))
        except ConfigError as error:
            raise ConfigError(f"override {override!r}: {error}") from None
    return result


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
            raise ConfigError(f"{'.'.join(keys[:depth])} is {_describe(node)}, it has no keys")
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


def build(cls: type[T], data: Mapping[str, Any], *, path: str = "", root: type | None = None) -> T:
    """An instance of dataclass `cls` from plain data. ConfigError names the full dotted path of what is wrong."""
    root = root or cls
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in data:
        if key not in fields:
            raise ConfigError(_unknown_key(cls, str(key), path, root))
    hints = get_type_hints(cls)
    missing = [name for name, field in fields.items() if name not in data and _is_required(field)]
    if missing:
        needed = ", ".join(f"{_join(path, name)} ({_type_name(hints[name])})" for name in missing)
        raise ConfigError(f"missing required {needed}; add it to the configuration")
    return cls(**{key: _convert(value, hints[key], _join(path, key), root) for key, value in data.items()})


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _convert(value: Any, hint: Any, path: str, root: type, *, accepts_null: bool = False) -> Any:
    """`value` as type `hint`, or ConfigError. Only an int widens (to float) and a list becomes a tuple."""
    origin = get_origin(hint)
    if dataclasses.is_dataclass(hint):
        if isinstance(value, Mapping):
            return build(hint, value, path=path, root=root)
    elif origin in (Union, types.UnionType):
        if value is None:
            return None
        (inner,) = (option for option in get_args(hint) if option is not type(None))
        return _convert(value, inner, path, root, accepts_null=True)
    elif origin is Literal:
        if any(value == option and type(value) is type(option) for option in get_args(hint)):
            return value
    elif origin is tuple:
        if isinstance(value, list | tuple):
            return _convert_tuple(value, hint, path, root)
    elif hint is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    elif type(value) is hint and hint is not float:
        return value
    or_null = ", or null" if accepts_null else ""
    raise ConfigError(f"{path}: got {_describe(value)}, need {_type_name(hint)}{or_null}{_hint_for(value, hint)}")


def _convert_tuple(items: Sequence[Any], hint: Any, path: str, root: type) -> tuple[Any, ...]:
    inner = get_args(hint)
    if inner[-1] is Ellipsis:
        inner = (inner[0],) * len(items)
    if len(items) != len(inner):
        raise ConfigError(f"{path}: got {len(items)} values {list(items)}, need {_type_name(hint)}")
    return tuple(
        _convert(item, item_hint, f"{path}.{i}", root)
        for i, (item, item_hint) in enumerate(zip(items, inner, strict=True))
    )


def _describe(value: Any) -> str:
    names = {dict: "a mapping", list: "a list", str: "text", int: "an integer", float: "a number", bool: "true/false"}
    if value is None:
        return "null"
    shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:57]}..."
    return f"{shown} ({names.get(type(value), type(value).__name__)})"


def _type_name(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        required = [field.name for field in dataclasses.fields(hint) if _is_required(field)]
        return f"a mapping with {', '.join(required)}" if required else "a mapping"
    if origin is Literal:
        return "one of " + ", ".join(map(str, inner))
    if origin in (Union, types.UnionType):
        return " or ".join("null" if option is type(None) else _type_name(option) for option in inner)
    if origin is tuple:
        count = "a list" if inner[-1] is Ellipsis else f"a list of {len(inner)}"
        return f"{count}, each {_type_name(inner[0])}"
    return {int: "an integer", float: "a finite number", str: "text", bool: "true or false"}[hint]


def _hint_for(value: Any, hint: Any) -> str:
    if hint is str and isinstance(value, int | float):
        return f"; put it in quotes: '{value}'"
    if get_origin(hint) is Literal and (near := difflib.get_close_matches(str(value), map(str, get_args(hint)), n=1)):
        return f"; did you mean {near[0]}?"
    if hint is int and isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    return ""


def _unknown_key(cls: type, key: str, path: str, root: type) -> str:
    """Names the nearest key of the same class, else one of that name anywhere in the configuration."""
    names = [field.name for field in dataclasses.fields(cls)]
    near = [_join(path, name) for name in difflib.get_close_matches(key, names, n=1)]
    if not near:
        leaves = {dotted.rsplit(".", 1)[-1]: dotted for dotted in reversed(list(_dotted_paths(root)))}
        near = [leaves[name] for name in difflib.get_close_matches(key, leaves, n=1)]
    advice = f"did you mean {near[0]}?" if near else f"keys of {path or 'the configuration'}: {', '.join(names)}"
    return f"unknown key {_join(path, key)}; {advice}"


def _dotted_paths(cls: type, path: str = "") -> Iterator[str]:
    for name, hint in get_type_hints(cls).items():
        dotted = _join(path, name)
        yield dotted
        child = f"{dotted}.0" if get_origin(hint) is tuple else dotted
        for inner in (hint, *get_args(hint)):
            if dataclasses.is_dataclass(inner):
                yield from _dotted_paths(inner, child)


def as_dict(config: Any) -> dict[str, Any]:
    """Plain data (dict, list, numbers, text) that `build` turns back into an equal object."""
    return _copy(dataclasses.asdict(config))


def to_yaml(config: Any) -> str:
    """The complete configuration, defaults included, as YAML that `load_config` reads back."""
    return yaml.dump(as_dict(config), Dumper=_Dumper, sort_keys=False, width=110)
