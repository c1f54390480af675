"""Which objectives an iteration of a stage runs, and which network it trains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rcm_megatron.config import DistillationConfig, StageConfig
from rcm_megatron.config.roles import low_noise_of
from rcm_megatron.diffusion import timesteps
from rcm_megatron.objectives.base import Pass
from rcm_megatron.registries import OBJECTIVES, settings_of


@dataclass(frozen=True, kw_only=True)
class Step:
    """What iteration ``iteration`` of a stage does."""

    trained: str
    """Role of the network that it updates."""
    objectives: tuple[str, ...]
    """Whose gradients add up into the update, in this order."""
    iteration: int
    rollout_steps: int
    """Student steps of a backward simulation."""
    warmup_ratio: float
    """r of the tangent warm-up."""
    side: Literal["high", "low"] | None = None
    """Of `distillation.expert_boundary`, on which the trained network is the one of its role; None: a role of one network."""


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Objectives in the order in which their gradients add up, which is that of `OBJECTIVES`, whatever that of a YAML file is."""
    wanted = set(names)
    return tuple(name for name in OBJECTIVES if name in wanted)


def companions_of(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Role -> the objectives that train it in iterations of their own."""
    companions = in_order(companion for name in names for companion in OBJECTIVES[name].companions)
    roles = dict.fromkeys(OBJECTIVES[name].trains for name in companions)
    return {role: tuple(name for name in companions if OBJECTIVES[name].trains == role) for role in roles}


def trainers_of(stage: StageConfig) -> dict[str, tuple[str, ...]]:
    """Role -> the objectives that train it in ``stage``."""
    names = in_order(stage.losses)
    return {OBJECTIVES[names[0]].trains: names} | companions_of(names)


def optimizer_resets(stages: Sequence[StageConfig], index: int) -> tuple[str, ...]:
    """Roles whose optimizer begins anew with stage ``index``: trained before, by other objectives or with `reset_optimizer`."""
    stage, before = (
        stages[index],
        {role: names for other in stages[:index] for role, names in trainers_of(other).items()},
    )
    if stage.reset_optimizer is not None:
        return tuple(role for role in trainers_of(stage) if stage.reset_optimizer and role in before)
    return tuple(role for role, names in trainers_of(stage).items() if before.get(role, names) != names)


def passes_of(step: Step, *, distillation: DistillationConfig, objectives: Mapping[str, Any]) -> Iterator[Pass]:
    """The passes of all objectives of ``step``; ``objectives``: their settings."""
    for name in step.objectives:
        yield from OBJECTIVES[name].passes(settings_of(name, objectives), step, distillation)


def plan_step(
    stage: StageConfig,
    iteration: int,
    *,
    max_rollout_steps: int,
    sides: Mapping[str, Mapping[str, Sequence[int]]] | None = None,
) -> Step:
    """Alternation and counts of iteration ``iteration`` (0-based within its stage); rCM (arXiv 2510.08431) Algorithm 1.

    The objectives of ``stage.losses`` train their network in the warm-up and then in one iteration of ``student_update_freq``; in the
    others their companions train theirs, several networks taking turns. A role of two networks (``sides``: `RunConfig.sides`) updates
    them in turn, and each counts its own updates.
    """
    names = in_order(stage.losses)
    companions, warmup = companions_of(names), stage.tangent_warmup
    counting = {"warmup": warmup, "student_update_freq": stage.student_update_freq}
    if not companions or timesteps.is_student_step(iteration, **counting):
        before = timesteps.student_updates_before(iteration, **counting)
        trained = OBJECTIVES[names[0]].trains
        chosen = tuple(name for name in names if iteration >= warmup or not OBJECTIVES[name].waits_for_warmup)
    else:
        before, turn = divmod(timesteps.companion_updates_before(iteration, **counting), len(companions))
        trained, chosen = list(companions.items())[turn]
    side, rollouts = None, range(1, max_rollout_steps + 1)
    if sides and trained in sides:
        before, which = divmod(before, len(sides[trained]))
        side = tuple(sides[trained])[which]
        trained, rollouts = low_noise_of(trained) if side == "low" else trained, sides[trained][side]
    return Step(
        trained=trained,
        objectives=chosen,
        iteration=iteration,
        rollout_steps=rollouts[before % len(rollouts)] if rollouts else 1,
        warmup_ratio=timesteps.tangent_warmup_ratio(iteration, warmup=warmup),
        side=side,
    )
