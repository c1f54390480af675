"""Eulerian distillation of a flow map: Align Your Flow (arXiv 2506.14603) section 3; at s = 0 it is sCM (arXiv 2410.11081)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rcm_megatron.diffusion import trigflow
from rcm_megatron.objectives.base import TEACHER_PHASE, Pass, teacher_passes
from rcm_megatron.objectives.two_times import EulerianSettings, TwoTimes, draw_times, train_eulerian

if TYPE_CHECKING:
    from rcm_megatron.config import DistillationConfig
    from rcm_megatron.objectives.plan import Step
    from rcm_megatron.objectives.work import ObjectiveResult, Work


class Emd(TwoTimes):
    """Where the student's map leads does not change along the teacher's trajectory."""

    name = "emd"
    roles = ("teacher", "student")
    Settings = EulerianSettings
    phases = TEACHER_PHASE | {"dual": "forward of the student with its tangent; backward is apart"}

    def passes(self, settings: EulerianSettings, step: Step, distillation: DistillationConfig) -> tuple[Pass, ...]:
        return teacher_passes(distillation), Pass(role="student", dual=1, backward=1)

    def run(self, work: Work[EulerianSettings]) -> ObjectiveResult:
        t, s = draw_times(work)
        xt = trigflow.add_noise(work.samples.x0_SBP, work.noise("noise"), t)
        return train_eulerian(work, xt, t, s, trigflow.velocity(xt, work.teacher(xt, t), t))


EMD = Emd()
