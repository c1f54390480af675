"""Lagrangian distillation of a flow map: Align Your Flow (arXiv 2506.14603) section 3, which finds that it over-smooths images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rcm_megatron.config.declare import NotNegativeFloat
from rcm_megatron.diffusion import flow_maps, trigflow
from rcm_megatron.objectives.base import STUDENT_PHASE, TEACHER_PHASE, Loss, Pass, teacher_passes
from rcm_megatron.objectives.two_times import TwoTimes, TwoTimesSettings, draw_times, towards

if TYPE_CHECKING:
    from torch import Tensor

    from rcm_megatron.config import DistillationConfig, RunConfig, StageConfig
    from rcm_megatron.dual import Dual
    from rcm_megatron.objectives.plan import Step
    from rcm_megatron.objectives.work import ObjectiveResult, Work


@dataclass(frozen=True, kw_only=True)
class LmdSettings(TwoTimesSettings):
    """As the others', and where the teacher may be asked."""

    min_time: NotNegativeFloat = 0.0
    """Smallest TrigFlow time s, at which the teacher is asked. Above 0 where given frames are at no noise (model.conditional_frames)."""


class Lmd(TwoTimes):
    """With s the student's map moves as the teacher does where the map leads."""

    name = "lmd"
    roles = ("teacher", "student")
    Settings = LmdSettings
    phases = TEACHER_PHASE | STUDENT_PHASE | {"dual": "forward of the student with its tangent; backward is apart"}

    def passes(self, settings: LmdSettings, step: Step, distillation: DistillationConfig) -> tuple[Pass, ...]:
        return teacher_passes(distillation), Pass(role="student", again=1, dual=1, backward=1)

    def check(self, run: RunConfig, settings: LmdSettings, stage: StageConfig, path: str) -> Iterator[str]:
        if run.model.conditional_frames and not settings.min_time:
            yield (
                f"objectives.lmd.min_time={settings.min_time} asks the teacher at time 0, where a velocity to given frames is 0/0; "
                "set objectives.lmd.min_time to 0.001"
            )

    def run(self, work: Work[LmdSettings]) -> ObjectiveResult:
        t, s = (time.clamp(min=work.settings.min_time) for time in draw_times(work))
        xt = trigflow.add_noise(work.samples.x0_SBP, work.noise("noise"), t)
        F = trigflow.velocity(xt, work.evaluate("student", xt, t, s_1B1=s, phase="student"), t)
        mapped = flow_maps.flow_map(xt, F, t, s)
        F_teacher, ratio = trigflow.velocity(mapped, work.teacher(mapped, s), s), work.step.warmup_ratio

        def loss(v: Dual, *, xt: Tensor, t: Tensor, s: Tensor, F_teacher: Tensor) -> Loss:
            F, dF = trigflow.velocity_jvp(xt, v.primal, t, 0 * xt, v.tangent, 0 * t)
            g = flow_maps.lagrangian_tangent(F, F_teacher, dF.detach(), xt, t, s, warmup_ratio=ratio)
            return towards(work, F, g, dF=dF.detach())

        given = work.dual_network_input(xt, t, 0 * xt, 0 * t, s=s, t_s=(t - s).sin())
        outputs = {"xt": xt, "time": t, "second_time": s, "mapped": mapped, "F_teacher": F_teacher}
        return work.train(given, loss, phase="dual", outputs=outputs, xt=xt, t=t, s=s, F_teacher=F_teacher)


LMD = Lmd()
