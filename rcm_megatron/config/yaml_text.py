"""YAML as configurations are written in it: what a plain word was typed as is not forgotten, and nothing of an override is dropped.

YAML 1.1 reads `010` as 8, `12:30` as 750, `no` as false and `2026-11-30` as a date. Numbers and truth values keep their spelling
(`Spelled`), so that a message can repeat what stands there, and one whose value would surprise is refused where a number is needed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import yaml

from rcm_megatron.config.errors import ConfigError


class Spelled:
    """A number or a truth value as it was typed; ``shell`` in an override, where quotes are for the shell first."""

    text: str
    shell: bool

    @property
    def surprising(self) -> bool:
        """Whether a person may read another number: leading zeros, sixties."""
        return bool(re.match(r"[-+]?0_*\d", self.text)) or ":" in self.text


class SpelledInt(int, Spelled):
    """An integer."""


class SpelledFloat(float, Spelled):
    """A number with a fraction or an exponent."""


class SpelledBool(int, Spelled):
    """True or false, which Python's own bool lets nobody derive from."""


def value_of(value: Any) -> Any:
    """The number or truth value alone."""
    for kind, plain in ((SpelledBool, bool), (SpelledInt, int), (SpelledFloat, float)):
        if isinstance(value, kind):
            return plain(value)
    return value


class Dumper(yaml.SafeDumper):
    """SafeDumper that writes short sequences on one line."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-6 as a number (YAML 1.1 wants 1.0e-6), dates as text, and refuses a key given twice."""

    shell = False


class _ShellLoader(_Loader):
    shell = True


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    twice = [key for i, key in enumerate(keys) if key in keys[:i]]
    if twice:
        raise ConfigError(f"line {node.start_mark.line + 1}: key {twice[0]!r} is given twice; keep one")
    return loader.construct_mapping(node, deep=True)


def _construct_spelled(kind: type, construct: Callable[[Any, yaml.ScalarNode], Any]) -> Callable[..., Any]:
    def constructor(loader: _Loader, node: yaml.ScalarNode) -> Any:
        value = kind(construct(loader, node))
        value.text, value.shell = node.value, loader.shell
        return value

    return constructor


_TAG = "tag:yaml.org,2002:"
_FLOAT = re.compile(r"^[-+]?(\d+\.\d*|\.\d+|\d+)([eE][-+]?\d+)?$")
_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)
_Loader.add_constructor(f"{_TAG}int", _construct_spelled(SpelledInt, yaml.SafeLoader.construct_yaml_int))
_Loader.add_constructor(f"{_TAG}float", _construct_spelled(SpelledFloat, yaml.SafeLoader.construct_yaml_float))
_Loader.add_constructor(f"{_TAG}bool", _construct_spelled(SpelledBool, yaml.SafeLoader.construct_yaml_bool))
_Loader.add_constructor(f"{_TAG}timestamp", lambda loader, node: node.value)
for _class in (_Loader, Dumper):  # the dumper puts text that the loader would take for a number in quotes
    _class.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+0123456789."))
Dumper.add_representer(
    list,
    lambda dumper, items: dumper.represent_sequence(
        f"{_TAG}seq", items, flow_style=not any(isinstance(item, dict) for item in items)
    ),
)


def parse(text: str) -> Any:
    """Plain data of a YAML document. ConfigError if it is not one."""
    return _parse(text, _Loader)


def parse_override(text: str) -> Any:
    """Plain data of the value of an override, all of it, for a shell has taken comments out: text with a `` #`` in it is text.

    ConfigError where YAML would drop something behind a value that is not plain text.
    """
    value = _parse(text, _ShellLoader)
    node = yaml.compose(text, Loader=_ShellLoader)
    rest = text if node is None else text[_end_of(node) :]
    if not rest.strip():
        return value
    if isinstance(value, str) and node.style is None:
        return text.strip()
    fix = "take it out, or quote all of it twice if it is text, e.g. 'name=\"7 #1\"'"
    raise ConfigError(f"got {rest.strip()!r}, which YAML reads as a comment; need a value; fix: {fix}")


def _end_of(node: yaml.Node) -> int:
    """Where its last character is; a mapping or a list without brackets ends, for YAML, behind the comments after it."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style:
        last = node.value[-1]
        return _end_of(last[1] if isinstance(last, tuple) else last)
    return node.end_mark.index


def _parse(text: str, loader: type[_Loader]) -> Any:
    try:
        return yaml.load(text, Loader=loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {' '.join(str(error).split())}") from None
    except ValueError as error:  # numbers that only look like YAML's, e.g. 09
        raise ConfigError(f"not valid YAML: {error}; text goes in quotes") from None
