"""MeanFlow (arXiv 2505.13447): a flow map from data, without a teacher. Defaults are those of its Table 1 and official code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rcm_megatron.config import TimeDistribution
from rcm_megatron.config.declare import Fraction
from rcm_megatron.diffusion import flow_maps, trigflow
from rcm_megatron.objectives.base import Pass
from rcm_megatron.objectives.two_times import EulerianSettings, TwoTimes, draw_times, train_eulerian

if TYPE_CHECKING:
    from rcm_megatron.config import DistillationConfig
    from rcm_megatron.objectives.plan import Step
    from rcm_megatron.objectives.work import ObjectiveResult, Work


@dataclass(frozen=True, kw_only=True)
class MeanFlowSettings(EulerianSettings):
    """share_equal = 1 is flow matching."""

    times: TimeDistribution | None = TimeDistribution(kind="lognormal", mean=-0.4, std=1.0)
    share_equal: Fraction = 0.75
    share_zero: Fraction = 0.0
    space: Literal["trigflow", "rf"] = "rf"
    normalisation: Literal["norm", "adaptive", "none"] = "adaptive"


class MeanFlow(TwoTimes):
    """The average velocity meets the MeanFlow identity with each sample's own velocity."""

    name = "mean_flow"
    roles = ("student",)
    Settings = MeanFlowSettings
    phases = {"dual": "forward of the student with its tangent; backward is apart"}  # noqa: RUF012

    def passes(self, settings: MeanFlowSettings, step: Step, distillation: DistillationConfig) -> tuple[Pass, ...]:
        return (Pass(role="student", dual=1, backward=1),)

    def run(self, work: Work[MeanFlowSettings]) -> ObjectiveResult:
        t, s = draw_times(work)
        x0, noise = work.samples.x0_SBP, work.noise("noise")
        xt, velocity = trigflow.add_noise(x0, noise, t), flow_maps.data_velocity(x0, noise, t)
        return train_eulerian(work, xt, t, s, velocity)


MEAN_FLOW = MeanFlow()
