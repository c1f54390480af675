"""Which kinds of update a run makes, and an iteration of each: what a dry run executes."""

from __future__ import annotations

from dataclasses import dataclass

from rcm_megatron.config import RunConfig
from rcm_megatron.objectives.plan import plan_step


@dataclass(frozen=True, kw_only=True)
class Update:
    """One kind of update."""

    name: str
    """For example "student: scm, dmd; rollout of 4"."""
    iteration: int
    """Of the whole run, at which it is made."""
    trained: str
    rollout_steps: int


def updates_of(run: RunConfig) -> list[Update]:
    """Every kind of update (a network, the objectives that train it), each with the longest rollout that it makes."""
    found: dict[tuple[str, tuple[str, ...]], Update] = {}
    start = 0
    for stage in run.stages:
        for within in range(min(stage.steps, _period(run, stage.tangent_warmup, stage.student_update_freq))):
            rollouts, sides = run.distillation.max_rollout_steps, run.sides
            step = plan_step(stage, within, max_rollout_steps=rollouts, sides=sides)
            key, known = (step.trained, step.objectives), found.get((step.trained, step.objectives))
            if known is None or step.rollout_steps > known.rollout_steps:
                name = f"{step.trained}: {', '.join(step.objectives)}; rollout of {step.rollout_steps}"
                numbers = {"iteration": start + within, "rollout_steps": step.rollout_steps}
                found[key] = Update(name=name, trained=step.trained, **numbers)
        start += stage.steps
    return list(found.values())


def _period(run: RunConfig, warmup: int, frequency: int) -> int:
    """Iterations after which a stage has made all its kinds of update with all lengths of rollouts: two networks a role, twice over."""
    return warmup + 4 * frequency * run.distillation.max_rollout_steps * len(run.roles)
