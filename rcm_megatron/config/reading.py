"""Plain data to frozen dataclasses by their types (`declare.py`), strictly, with every problem at once.

Reading never stops at a problem: the value that has it becomes `REFUSED`, and the rest is read and checked as far as it can be without.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from rcm_megatron.config.declare import REFUSED, Bounds, ByName, Expanded, MergedOnto, Problem, Variants, until_refused
from rcm_megatron.config.describe import describe, hint_for, join, missing_key, plain, type_name, unknown_key
from rcm_megatron.config.errors import ConfigError
from rcm_megatron.config.yaml_text import Spelled, value_of
from rcm_megatron.paths import PathError, expanded

T = TypeVar("T")


def build(cls: type[T], data: Mapping[str, Any], *, path: str = "") -> T:
    """An instance of dataclass ``cls`` from plain data. Raises ConfigError with every problem, each with its full dotted path."""
    value, problems = read(cls, data, path=path)
    if problems := [*problems, *(problem.text for problem in section_problems(value, path))]:
        raise ConfigError("\n".join(problems))
    return value


def read(cls: type[T], data: Mapping[str, Any], *, path: str = "") -> tuple[T, list[str]]:
    """``cls`` from plain data with `REFUSED` for what was refused, and why. Its sections' own checks are `section_problems`."""
    reader = _Reader(cls, data)
    value = reader.section(cls, data, path)
    return value, [problem for problem in reader.problems if not reader.is_repeated(problem)]


def section_problems(value: Any, path: str = "") -> Iterator[Problem]:
    """What ``check`` of every dataclass in ``value`` has to say, itself first."""
    if dataclasses.is_dataclass(value):
        if hasattr(value, "check"):
            yield from until_refused(value.check(path))
        for field in dataclasses.fields(value):
            yield from section_problems(getattr(value, field.name), join(path, field.name))
    elif isinstance(value, Mapping | tuple):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from section_problems(item, join(path, str(key)))


@lru_cache(maxsize=256)
def hints_of(cls: type) -> dict[str, Any]:
    """Declared type of every field."""
    return get_type_hints(cls, include_extras=True)


class _Reader:
    def __init__(self, root: type, data: Mapping[str, Any]) -> None:
        self.root, self.data = root, data
        self.problems: list[str] = []
        self.merged: dict[str, str] = {}
        """Path of a section -> path of the one that it was merged onto."""

    def refuse(self, problem: str) -> Any:
        self.problems.append(problem)
        return REFUSED

    def is_repeated(self, problem: str) -> bool:
        """Whether it lies in what a merged section took over, and is named there."""
        return any(
            problem.startswith(f"{path}.") and base + problem.removeprefix(path) in self.problems
            for path, base in self.merged.items()
        )

    def section(self, cls: type[T], data: Mapping[str, Any], path: str) -> T:
        fields, hints = {field.name: field for field in dataclasses.fields(cls)}, hints_of(cls)
        for key in data:
            if key not in fields:
                self.refuse(unknown_key(cls, str(key), path, self.root))
        values = {key: self.value(data[key], hints[key], join(path, key)) for key in fields if key in data}
        for name, field in fields.items():
            if name not in data and field.default is field.default_factory is dataclasses.MISSING:
                values[name] = self.refuse(missing_key(join(path, name), hints[name]))
        return cls(**values)

    def value(self, value: Any, hint: Any, path: str, *, or_null: bool = False) -> Any:
        """``value`` as ``hint`` says, or `REFUSED`. Only an int widens (to float) and a list becomes a tuple."""
        hint, notes = plain(hint)
        typed, value = value, value_of(value)
        for note in notes:
            if isinstance(note, MergedOnto) and isinstance(value, Mapping):
                typed = value = _merged(_at(self.data, note.path), value)
                self.merged[path] = note.path
            elif isinstance(note, Variants) and isinstance(value, Mapping):
                return self.variant(value, note.tag, note.classes(), path)
            elif isinstance(note, ByName) and isinstance(value, Mapping):
                return self.by_name(value, note.classes(), path)
        if get_origin(hint) in (Union, types.UnionType):
            return self.union(typed, get_args(hint), path)
        bounds = [note for note in notes if isinstance(note, Bounds)]
        known, read = self.of_type(value, hint, path)
        if isinstance(typed, Spelled) and typed.surprising:
            known = False
        if known and any(isinstance(note, Expanded) for note in notes):
            return self.expanded(read, path)
        if known and (read is REFUSED or all(limit.hold(read) for limit in bounds)):
            return read
        need = type_name(hint, bounds) + (", or null" if or_null else "")
        got = describe(typed) if not known else str(list(read) if isinstance(read, tuple) else value)
        return self.refuse(f"{path}: got {got}, need {need}{'' if known else hint_for(typed, hint, path)}")

    def expanded(self, text: str, path: str) -> Any:
        try:
            return expanded(text)
        except PathError as error:
            return self.refuse(f"{path}: {error}")

    def of_type(self, value: Any, hint: Any, path: str) -> tuple[bool, Any]:
        """Whether ``value`` is of the type ``hint``, and as what."""
        origin = get_origin(hint)
        if dataclasses.is_dataclass(hint):
            return (True, self.section(hint, value, path)) if isinstance(value, Mapping) else (False, None)
        if origin is Literal:
            return any(value == option and type(value) is type(option) for option in get_args(hint)), value
        if origin is tuple:
            return (True, self.items(value, hint, path)) if isinstance(value, list | tuple) else (False, None)
        if isinstance(origin, type) and issubclass(origin, Mapping):
            inner = get_args(hint)[1]
            if not isinstance(value, Mapping):
                return False, None
            return True, {str(key): self.value(item, inner, join(path, str(key))) for key, item in value.items()}
        if hint is float:
            finite = type(value) in (int, float) and math.isfinite(value)
            return finite, float(value) if finite else value
        return type(value) is hint, value

    def items(self, items: Sequence[Any], hint: Any, path: str) -> Any:
        inner = get_args(hint)
        if inner[-1] is Ellipsis:
            inner = (inner[0],) * len(items)
        if len(items) != len(inner):
            return self.refuse(f"{path}: got {len(items)} values {list(items)}, need {type_name(hint)}")
        return tuple(self.value(item, inner[i], join(path, str(i))) for i, item in enumerate(items))

    def union(self, value: Any, options: tuple[Any, ...], path: str) -> Any:
        null = type(None) in options
        if value is None and null:
            return None
        options = tuple(option for option in options if option is not type(None))
        if len(options) == 1 or not isinstance(value, Mapping):
            return self.value(value, options[0], path, or_null=null)
        tag = next(name for name, hint in hints_of(options[0]).items() if get_origin(hint) is Literal)
        classes = {get_args(hints_of(option)[tag])[0]: option for option in options}
        return self.variant(value, tag, classes, path)

    def variant(self, data: Mapping[str, Any], tag: str, classes: Mapping[str, type], path: str) -> Any:
        name = data.get(tag)
        if isinstance(name, str) and name in classes:
            return self.section(classes[name], data, path)
        where, need = join(path, tag), Literal[tuple(classes)]
        if tag not in data:
            return self.refuse(missing_key(where, need))
        return self.value(name, need, where)

    def by_name(self, data: Mapping[str, Any], classes: Mapping[str, type], path: str) -> Any:
        known = {str(key): item for key, item in data.items() if key in classes}
        for key in data:
            if key not in classes:
                self.refuse(unknown_key(list(classes), str(key), path, self.root))
        return {key: self.value(item, classes[key], join(path, key)) for key, item in known.items()}


def _at(data: Any, path: str) -> Any:
    for key in path.split("."):
        data = data.get(key) if isinstance(data, Mapping) else None
    return data


def _merged(base: Any, changes: Any) -> Any:
    """``changes`` over ``base``, key by key; what is no mapping replaces."""
    if not isinstance(base, Mapping) or not isinstance(changes, Mapping):
        return changes
    return {**base, **{key: _merged(base.get(key), value) for key, value in changes.items()}}
