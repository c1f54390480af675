"""Named values of one kind (families, objectives, formats), imported when they are asked for."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from rcm_megatron.errors import UserError

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Name -> value. An entry "package.module:attribute" is imported at its first use, so a registry can be read without torch."""

    def __init__(self, kind: str, entries: Mapping[str, str]) -> None:
        self.kind = kind
        self._entries: dict[str, str | T] = dict(entries)

    def __getitem__(self, name: str) -> T:
        """Raises UserError for a name that is not there; it gives the nearest."""
        if name not in self._entries:
            near = difflib.get_close_matches(name, self._entries, n=1)
            fix = f"did you mean {near[0]}?" if near else f"need one of {', '.join(self._entries)}"
            raise UserError(f"unknown {self.kind} {name!r}; {fix}")
        entry = self._entries[name]
        if isinstance(entry, str):
            entry = self._entries[name] = _imported(entry)
        return entry

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def register(self, name: str, value: T) -> None:
        """``value`` is known as ``name`` from now on: for plugins. Raises UserError for a name that is taken."""
        if name in self._entries:
            raise UserError(f"{self.kind} {name!r} is there already; give yours another name")
        self._entries[name] = value

    @contextmanager
    def registered(self, name: str, value: T) -> Iterator[None]:
        """``value`` is known as ``name`` inside: for a test, or a program around this one."""
        assert name not in self._entries, f"{self.kind} {name!r} is there already"
        self._entries[name] = value
        try:
            yield
        finally:
            del self._entries[name]


class Lazy:
    """A class attribute "package.module:attribute" that is imported when it is first asked for."""

    def __init__(self, entry: str) -> None:
        self._entry = entry

    def __get__(self, instance: object, owner: type) -> Any:
        return _imported(self._entry)


def _imported(entry: str) -> Any:
    module, _, attribute = entry.partition(":")
    return getattr(importlib.import_module(module), attribute)
