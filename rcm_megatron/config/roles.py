"""Which networks a run has: their roles follow from the objectives of its stages."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from rcm_megatron.registries import OBJECTIVES

if TYPE_CHECKING:
    from rcm_megatron.config.run import StageConfig


def low_noise_of(role: str) -> str:
    """The second network of a role that is two (Wan2.2 A14B): that of RF times below `distillation.expert_boundary`."""
    return f"{role}_low_noise"


def first_of(role: str) -> str:
    """The role of which ``role`` is the network, the first or the second."""
    return role.removesuffix("_low_noise")


def split_weights(weights: str) -> tuple[str, str]:
    """(role, "ema" or "") of what --weights names: a role, the average of its weights as ROLE.ema, or ema for the student's."""
    role, _, part = ("student.ema" if weights == "ema" else weights).partition(".")
    return role, part


def low_noise_weights(weights: str, given: Collection[str]) -> str | None:
    """What --weights calls the second network of a role that is two, its average with the role's average; None: it is one.

    ``given``: the roles that the run describes."""
    role, part = split_weights(weights)
    second = low_noise_of(role)
    return ".".join(filter(None, (second, part))) if second in given else None


def parts_of(roles: Iterable[str], given: Iterable[str]) -> tuple[str, ...]:
    """``roles``, each with its second network if that is among those that the run describes."""
    given = tuple(given)
    return tuple(part for role in roles for part in (role, low_noise_of(role)) if part == role or part in given)


def known_roles() -> tuple[str, ...]:
    """Every role that an objective may ask for."""
    needed = dict.fromkeys(role for objective in OBJECTIVES.values() for role in objective.roles)
    return parts_of(needed, map(low_noise_of, needed))


def objectives_of(stages: Iterable[StageConfig]) -> tuple[str, ...]:
    """The objectives of all stages, companions included, in the order of the registry."""
    named = {name for stage in stages for name in stage.losses}
    named |= {companion for name in named for companion in OBJECTIVES[name].companions}
    return tuple(name for name in OBJECTIVES if name in named)


def needed_roles(stages: Iterable[StageConfig], given: Iterable[str]) -> tuple[str, ...]:
    """The roles that the stages' objectives need, the trained ones last. ``given``: those that the run describes."""
    needed = dict.fromkeys(role for name in objectives_of(stages) for role in OBJECTIVES[name].roles)
    trained = trained_roles(stages, given)
    return (*(role for role in parts_of(needed, given) if role not in trained), *trained)


def trained_roles(stages: Iterable[StageConfig], given: Iterable[str]) -> tuple[str, ...]:
    """The roles that the stages' objectives train."""
    return parts_of(dict.fromkeys(OBJECTIVES[name].trains for name in objectives_of(stages)), given)


def tangent_roles(stages: Iterable[StageConfig], given: Iterable[str]) -> tuple[str, ...]:
    """The roles that the stages' objectives take a tangent of."""
    objectives = [OBJECTIVES[name] for name in objectives_of(stages)]
    return parts_of(dict.fromkeys(objective.trains for objective in objectives if objective.takes_tangent), given)
