"""Which networks a run has: their roles follow from the objectives of its stages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rcm_megatron.objectives import OBJECTIVES

if TYPE_CHECKING:
    from rcm_megatron.config.run import StageConfig

PARTS = {"teacher": ("teacher_low_noise",)}
"""Further networks that a role is made of, where the run has them."""


def known_roles() -> tuple[str, ...]:
    """Every role that an objective may ask for."""
    needed = [role for objective in OBJECTIVES.values() for role in objective.roles]
    return tuple(dict.fromkeys(part for role in needed for part in (role, *PARTS.get(role, ()))))


def objectives_of(stages: Iterable[StageConfig]) -> tuple[str, ...]:
    """The objectives of all stages, companions included, in the order of the registry."""
    named = {name for stage in stages for name in stage.losses}
    named |= {companion for name in named for companion in OBJECTIVES[name].companions}
    return tuple(name for name in OBJECTIVES if name in named)


def needed_roles(stages: Iterable[StageConfig], given: Iterable[str]) -> tuple[str, ...]:
    """The roles that the stages' objectives need, the trained ones last. ``given``: those that the run describes."""
    needed = dict.fromkeys(role for name in objectives_of(stages) for role in OBJECTIVES[name].roles)
    with_parts = dict.fromkeys(
        part for role in needed for part in (role, *PARTS.get(role, ())) if part in needed or part in given
    )
    trained = trained_roles(stages)
    return (*(role for role in with_parts if role not in trained), *trained)


def trained_roles(stages: Iterable[StageConfig]) -> tuple[str, ...]:
    """The roles that the stages' objectives train."""
    return tuple(dict.fromkeys(OBJECTIVES[name].trains for name in objectives_of(stages)))


def tangent_roles(stages: Iterable[StageConfig]) -> tuple[str, ...]:
    """The roles that the stages' objectives take a tangent of."""
    objectives = [OBJECTIVES[name] for name in objectives_of(stages)]
    return tuple(dict.fromkeys(objective.trains for objective in objectives if objective.takes_tangent))
