"""One iteration of a stage: which networks it trains, with which objectives, and the gradients it leaves behind."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from rcm_megatron.config import DistillationConfig, StageConfig
from rcm_megatron.diffusion import timesteps
from rcm_megatron.networks.roles import Networks
from rcm_megatron.training import objectives
from rcm_megatron.training.objectives import MicroBatch, ObjectiveResult


@dataclass(frozen=True)
class Step:
    """What iteration ``iteration`` of a stage does. ``trained`` is "student" or "fake_score"."""

    trained: str
    iteration: int
    rollout_steps: int
    warmup_ratio: float
    dmd_active: bool


def plan_step(stage: StageConfig, iteration: int, *, max_rollout_steps: int) -> Step:
    """Alternation and counts of iteration ``iteration`` (0-based within its stage); rCM Algorithm 1."""
    counting = {"warmup": stage.tangent_warmup, "student_update_freq": stage.student_update_freq}
    student = not stage.losses.dmd or timesteps.is_student_step(iteration, **counting)
    count = timesteps.student_updates_before if student else timesteps.critic_updates_before
    return Step(
        trained="student" if student else "fake_score",
        iteration=iteration,
        rollout_steps=timesteps.rollout_steps(count(iteration, **counting), max_steps=max_rollout_steps),
        warmup_ratio=timesteps.tangent_warmup_ratio(iteration, warmup=stage.tangent_warmup),
        dmd_active=timesteps.dmd_is_active(iteration, warmup=stage.tangent_warmup),
    )


def accumulate_step(
    step: Step,
    networks: Networks,
    batches: Sequence[MicroBatch],
    *,
    stage: StageConfig,
    settings: DistillationConfig,
) -> dict[str, ObjectiveResult]:
    """Run the passes of ``step`` over all micro-batches and leave their summed gradients in ``main_grad``.

    Gradients of all objectives of a student step add up into one update, so they are reduced once: by the caller, who finishes what the
    last objective's last backward may have started.
    """
    passes = objectives_of(step, stage)
    last = list(passes)[-1]
    return {name: run(networks, batches, settings, is_last=name == last) for name, run in passes.items()}


def objectives_of(step: Step, stage: StageConfig) -> dict[str, Callable[..., ObjectiveResult]]:
    """The objectives of ``step``, in the order in which their gradients add up."""
    weights, rollout = stage.losses, {"rollout_steps": step.rollout_steps}
    if step.trained == "fake_score":
        return {"critic": partial(objectives.critic, **rollout)}
    passes = {}
    if weights.flow:
        passes["flow"] = partial(objectives.flow_matching, weight=weights.flow)
    if weights.dcm:
        passes["dcm"] = partial(objectives.dcm, weight=weights.dcm)
    if weights.scm:
        passes["scm"] = partial(objectives.scm, warmup_ratio=step.warmup_ratio, weight=weights.scm)
    if weights.dmd and step.dmd_active:
        passes["dmd"] = partial(objectives.dmd, **rollout, weight=weights.dmd)
    return passes
