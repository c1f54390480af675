"""Advice that works: a change is named only where every rule accepts what comes of it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from rcm_megatron.config.declare import Change, Problem, Refused

Rules = Callable[[Any, int | None], list[Problem]]
"""All problems of a configuration on a number of processes."""


def explain(config: Any, world_size: int | None, rules: Rules) -> list[str]:
    """The problems that ``rules`` find, each with the changes that mend it and break nothing else."""
    found = rules(config, world_size)
    return [problem.text + _advice(problem, config, world_size, rules, found) for problem in found]


def _advice(problem: Problem, config: Any, world_size: int | None, rules: Rules, found: Sequence[Problem]) -> str:
    before = Counter(other.path for other in found)
    advised = []
    for change in problem.changes:
        working = (
            value for value in change.values if _mends(problem, change.path, value, config, world_size, rules, before)
        )
        if values := list(islice(working, change.most)):
            advised.append(_sentence(change, values))
    if not advised:
        return f"; {problem.otherwise}" if problem.otherwise else ""
    return f"; {', or '.join(advised)}"


def _mends(
    problem: Problem, path: str, value: Any, config: Any, world_size: int | None, rules: Rules, before: Counter[str]
) -> bool:
    processes = path == "processes"
    try:
        after = rules(
            config if processes else _changed(config, path.split("."), value), value if processes else world_size
        )
    except Refused:
        return False
    left = Counter(other.path for other in after)
    return left <= before and left[problem.path] < before[problem.path]


def _changed(node: Any, keys: Sequence[str], value: Any) -> Any:
    if not keys:
        return value
    key, rest = keys[0], keys[1:]
    if isinstance(node, tuple):
        return tuple(_changed(item, rest, value) if i == int(key) else item for i, item in enumerate(node))
    if isinstance(node, Mapping):
        return {**node, key: _changed(node[key], rest, value)}
    return dataclasses.replace(node, **{key: _changed(getattr(node, key), rest, value)})


def _sentence(change: Change, values: Sequence[Any]) -> str:
    shown = [_shown(value) for value in values]
    listed = f"{', '.join(shown[:-1])} or {shown[-1]}" if len(shown) > 1 else shown[0]
    return f"start {listed} processes" if change.path == "processes" else f"set {change.path} to {listed}"


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    return str(list(value)) if isinstance(value, tuple) else str(value)


def divisors(number: int) -> Iterator[int]:
    """Of ``number``, from 1 up."""
    return (i for i in range(1, number + 1) if number % i == 0)


def multiples_near(number: int, step: int, *, least: int = 1) -> list[int]:
    """Multiples of ``step`` from ``least`` to about twice ``number``, the nearest first."""
    span = range(step, 2 * max(number, least) + 2 * step + 1, step)
    return sorted((value for value in span if value >= least), key=lambda value: (abs(value - number), value))


def multiples_from(number: int, step: int, *, count: int = 64) -> Iterator[int]:
    """The first ``count`` multiples of ``step`` that are not below ``number``."""
    first = -(-max(number, 1) // step) * step
    return (first + step * i for i in range(count))
