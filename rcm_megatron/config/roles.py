"""Which networks a run has: their roles follow from the objectives of its stages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rcm_megatron.config.run import StageConfig


@dataclass(frozen=True)
class Roles:
    """What an objective needs, and which of it the objective trains."""

    needs: tuple[str, ...]
    trains: str
    takes_tangent: bool = False
    """Of what it trains."""


OF_OBJECTIVE = {
    "flow": Roles(("student",), "student"),
    "dcm": Roles(("teacher", "student"), "student"),
    "scm": Roles(("teacher", "student"), "student", takes_tangent=True),
    "dmd": Roles(("teacher", "student", "fake_score"), "student"),
    "critic": Roles(("student", "fake_score"), "fake_score"),
}
COMPANIONS = {"dmd": ("critic",)}
"""Objectives that come along with another."""
PARTS = {"teacher": ("teacher_low_noise",)}
"""Further networks that a role is made of, where the run has them."""


def known_roles() -> tuple[str, ...]:
    """Every role that an objective may ask for."""
    needed = [role for objective in OF_OBJECTIVE.values() for role in objective.needs]
    return tuple(dict.fromkeys(part for role in needed for part in (role, *PARTS.get(role, ()))))


def objectives_of(stages: Iterable[StageConfig]) -> Iterator[str]:
    """The objectives of all stages, companions included."""
    for stage in stages:
        for name in ("flow", "dcm", "scm", "dmd"):
            if getattr(stage.losses, name):
                yield name
                yield from COMPANIONS.get(name, ())


def needed_roles(stages: Iterable[StageConfig], given: Iterable[str]) -> tuple[str, ...]:
    """The roles that the stages' objectives need, the trained ones last. ``given``: those that the run describes."""
    objectives = [OF_OBJECTIVE[name] for name in objectives_of(stages)]
    needed = dict.fromkeys(role for objective in objectives for role in objective.needs)
    with_parts = dict.fromkeys(
        part for role in needed for part in (role, *PARTS.get(role, ())) if part in needed or part in given
    )
    trained = trained_roles(stages)
    return (*(role for role in with_parts if role not in trained), *trained)


def trained_roles(stages: Iterable[StageConfig]) -> tuple[str, ...]:
    """The roles that the stages' objectives train."""
    return tuple(dict.fromkeys(OF_OBJECTIVE[name].trains for name in objectives_of(stages)))


def tangent_roles(stages: Iterable[StageConfig]) -> tuple[str, ...]:
    """The roles that the stages' objectives take a tangent of."""
    objectives = [OF_OBJECTIVE[name] for name in objectives_of(stages)]
    return tuple(dict.fromkeys(objective.trains for objective in objectives if objective.takes_tangent))
