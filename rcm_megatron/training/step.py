"""The gradients of one step: its objectives on the networks, one after the other."""

from collections.abc import Mapping
from typing import Any

from rcm_megatron.config import DistillationConfig, StageConfig
from rcm_megatron.networks.roles import Networks
from rcm_megatron.objectives.plan import Step
from rcm_megatron.objectives.samples import Samples
from rcm_megatron.objectives.work import ObjectiveResult, Work
from rcm_megatron.registries import OBJECTIVES, settings_of


def accumulate_step(
    step: Step,
    networks: Networks,
    samples: Samples,
    *,
    stage: StageConfig,
    distillation: DistillationConfig,
    objectives: Mapping[str, Any],
) -> dict[str, ObjectiveResult]:
    """Run the passes of ``step`` over all samples and leave their summed gradients in ``main_grad``.

    Gradients of all objectives of a step add up into one update, so they are reduced once: by the caller, who finishes what the last
    objective's last backward may have started. Companions have the weight 1.
    ``objectives``: settings by name, as in a run's configuration.
    """
    results = {}
    for name in step.objectives:
        objective = OBJECTIVES[name]
        work = Work(
            objective=objective,
            settings=settings_of(name, objectives),
            distillation=distillation,
            step=step,
            weight=stage.losses.get(name, 1.0),
            networks=networks,
            samples=samples,
            is_last=name == step.objectives[-1],
        )
        results[name] = objective.run(work)
    return results
