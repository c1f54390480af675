"""The objectives of a stage against each other and its counts: problems as got, need, fix. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rcm_megatron.config.roles import first_of
from rcm_megatron.registries import OBJECTIVES

if TYPE_CHECKING:
    from rcm_megatron.config import StageConfig


def stage_problems(stage: StageConfig, path: str) -> Iterator[str]:
    """Of ``stage``, whose own fields are in bounds."""
    if not stage.losses:
        yield f"{path}.losses: got none, need an objective with its weight, one of {', '.join(OBJECTIVES)}"
        return
    yield from _trained(stage, path)
    yield from _alternation(stage, path)
    yield from _warmup(stage, path)
    yield from _learning_rates(stage, path)


def _trained(stage: StageConfig, path: str) -> Iterator[str]:
    """The losses train one network, companions the others."""
    trained = {name: OBJECTIVES[name].trains for name in stage.losses}
    if len(set(trained.values())) > 1:
        pairs = ", ".join(f"{name} trains {role}" for name, role in trained.items())
        yield f"{path}.losses must train one network, got {pairs}; give each its own stage"


def _alternation(stage: StageConfig, path: str) -> Iterator[str]:
    owners = [name for name in stage.losses if OBJECTIVES[name].companions]
    roles = sorted({OBJECTIVES[companion].trains for name in owners for companion in OBJECTIVES[name].companions})
    frequency = stage.student_update_freq
    if owners and frequency == 1:
        needed = f"{', '.join(roles)}, which {', '.join(owners)} needs"
        yield f"{path}.student_update_freq=1 never trains {needed}; set 2 or more (5 for Wan 1.3B)"
    if not owners and frequency != 1:
        having = ", ".join(name for name in OBJECTIVES if OBJECTIVES[name].companions)
        yield f"{path}.student_update_freq={frequency} leaves iterations to no network; set 1, or add a loss with one ({having})"


def _warmup(stage: StageConfig, path: str) -> Iterator[str]:
    warmup, objectives = stage.tangent_warmup, [OBJECTIVES[name] for name in stage.losses]
    if warmup and not any(objective.has_warmup for objective in objectives):
        having = " or ".join(name for name in OBJECTIVES if OBJECTIVES[name].has_warmup)
        yield f"{path}.tangent_warmup={warmup} needs a loss with a tangent ({having}); set tangent_warmup to 0"
    elif warmup and all(objective.waits_for_warmup for objective in objectives):
        yield f"{path}.tangent_warmup={warmup} would leave the network without a loss; set it to 0"


def _learning_rates(stage: StageConfig, path: str) -> Iterator[str]:
    companions = {companion for name in stage.losses for companion in OBJECTIVES[name].companions}
    trained = sorted({OBJECTIVES[name].trains for name in (*stage.losses, *companions)})
    for role in stage.lr:
        if first_of(role) not in trained:
            yield f"{path}.lr.{role}: the stage trains no such network; need one of {', '.join(trained)}"
