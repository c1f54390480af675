"""What the dataclasses of a configuration say in their types, beside Python's own; `reading.py` follows it.

| declaration | accepts |
| --- | --- |
| ``int``, ``float``, ``str``, ``bool``, ``Literal[...]``, ``X | None``, ``tuple[X, ...]``, a dataclass | it; int widens to float |
| ``Positive``, ``Annotated[float, Bounds(gt=0, lt=1)]``, ``Annotated[tuple[X, ...], Bounds(count=1)]`` | values within bounds |
| ``FilePath`` | text, in which `~` and `$NAME` are expanded |
| ``Mapping[str, X]`` | a mapping of any names to X |
| ``A | B``, dataclasses that each have the field ``kind: Literal["a"]`` | the one whose literal ``kind`` says |
| ``Annotated[Base, Variants("kind", classes)]`` | the same with classes from a registry: ``classes()`` is a mapping of literal to class |
| ``Annotated[Mapping[str, Any], ByName(classes)]`` | a mapping of names to the class that ``classes()`` has for each |
| ``Annotated[X | None, MergedOnto("model")]`` | only what differs from the section ``model`` of the same configuration |

A dataclass may have ``check(self, path)``, a generator of what is wrong between its own fields: text that begins with the full path of
a field, or a `Problem`. It may read any field, for where one was refused already the check ends there (`Refused`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Limits of a number, or least count of a list's items. ``note`` says what a special value means, e.g. "0: none"."""

    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None
    count: int | None = None
    note: str = ""

    def hold(self, value: Any) -> bool:
        """Whether ``value``, of the right type, is within."""
        if self.count is not None:
            return len(value) >= self.count
        return (
            (self.gt is None or value > self.gt)
            and (self.ge is None or value >= self.ge)
            and (self.lt is None or value < self.lt)
            and (self.le is None or value <= self.le)
        )

    def __str__(self) -> str:
        words = {"gt": "greater than", "ge": "at least", "lt": "less than", "le": "at most"}
        limits = [f"{word} {getattr(self, name)}" for name, word in words.items() if getattr(self, name) is not None]
        limits += [] if self.count is None else [f"with {self.count} or more items"]
        return " and ".join(limits) + (f" ({self.note})" if self.note else "")


class Expanded:
    """Text that is a path: `~` and `$NAME` in it are expanded when it is read (`rcm_megatron.paths`)."""


FilePath = Annotated[str, Expanded()]
Positive = Annotated[int, Bounds(gt=0)]
PositiveFloat = Annotated[float, Bounds(gt=0)]
NotNegative = Annotated[int, Bounds(ge=0)]
NotNegativeFloat = Annotated[float, Bounds(ge=0)]
Fraction = Annotated[float, Bounds(ge=0, le=1)]

Classes = Callable[[], Mapping[str, type]]
"""Called when a configuration is read, so that declaring it imports no registry's values."""


@dataclass(frozen=True)
class Variants:
    """A section whose class is told by its field ``tag``."""

    tag: str
    classes: Classes


@dataclass(frozen=True)
class ByName:
    """A mapping in which each name has a class of its own."""

    classes: Classes


@dataclass(frozen=True)
class MergedOnto:
    """A section that may give only what differs from the one at ``path`` of the whole configuration (dotted). null stays null."""

    path: str


class AttributeOf(Mapping[str, Any]):
    """One attribute of every value of a registry, looked up when it is asked for: ``AttributeOf(OBJECTIVES, "Settings")``."""

    def __init__(self, registry: Mapping[str, Any], attribute: str) -> None:
        self._registry, self._attribute = registry, attribute

    def __getitem__(self, name: str) -> Any:
        return getattr(self._registry[name], self._attribute)

    def __contains__(self, name: object) -> bool:
        return name in self._registry

    def __iter__(self) -> Iterator[str]:
        return iter(self._registry)

    def __len__(self) -> int:
        return len(self._registry)


@dataclass(frozen=True)
class Change:
    """Values to try for the field at ``path``, the best first, of which up to ``most`` that work are named. "processes": of the run."""

    path: str
    values: Iterable[Any]
    most: int = 1


@dataclass(frozen=True)
class Problem:
    """What is wrong, and changes that may mend it: only those are named that every rule accepts (`advice.py`)."""

    text: str
    changes: tuple[Change, ...] = ()
    otherwise: str = ""
    """Advice where no single change helps."""

    @property
    def path(self) -> str:
        """Of the field that the text begins with."""
        return self.text.replace(":", "=").partition("=")[0].split(" ")[0]


class Refused(Exception):
    """A rule has come to a value that was refused already; it has nothing to say."""


def _refuse(*_: object) -> Any:
    raise Refused


class RefusedValue:
    """Stands in a partly read configuration for a value that was refused. Whatever is done with it ends the rule."""

    __slots__ = ()
    __getattr__ = __eq__ = __ne__ = __hash__ = __bool__ = __len__ = __iter__ = __contains__ = __getitem__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refuse
    __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __neg__ = __abs__ = _refuse
    __index__ = __int__ = __float__ = __str__ = __repr__ = __format__ = _refuse


REFUSED: Any = RefusedValue()


def until_refused(rule: Iterable[str | Problem]) -> Iterator[Problem]:
    """What ``rule`` yields before it comes to a refused value."""
    try:
        for problem in rule:
            yield Problem(problem) if isinstance(problem, str) else problem
    except Refused:
        return
