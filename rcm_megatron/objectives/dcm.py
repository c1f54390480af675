"""Discrete consistency distillation: consistency models (arXiv 2303.01469) Algorithm 2, on a TrigFlow grid and with a guided teacher.

The released code of rCM (arXiv 2510.08431) has it as its first stage: k Euler steps of the teacher between two times of a grid, the target
from the student itself (no EMA), squared error of x0. sCM (arXiv 2410.11081) section 2.2 calls the family discrete-time consistency models.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rcm_megatron.config.declare import Positive, PositiveFloat
from rcm_megatron.diffusion import losses, timesteps, trigflow
from rcm_megatron.objectives.base import STUDENT_PHASE, TEACHER_PHASE, Loss, Objective, Pass, teacher_passes

if TYPE_CHECKING:
    from torch import Tensor

    from rcm_megatron.config import DistillationConfig
    from rcm_megatron.objectives.plan import Step
    from rcm_megatron.objectives.work import ObjectiveResult, Work


@dataclass(frozen=True, kw_only=True)
class DcmSettings:
    """`skip` teacher Euler steps on a grid of `total_steps` times."""

    total_steps: Positive = 48
    skip: Positive = 1
    shift: PositiveFloat = 5.0

    def check(self, path: str) -> Iterator[str]:
        """A skip is a part of the grid."""
        if self.skip > self.total_steps:
            yield f"{path}.skip={self.skip} must be at most {path}.total_steps={self.total_steps}"


class Dcm(Objective):
    """The student's x0 at t_0 meets its own at t_skip after teacher Euler steps."""

    name = "dcm"
    roles = ("teacher", "student")
    trains = "student"
    Settings = DcmSettings
    phases = TEACHER_PHASE | STUDENT_PHASE

    def passes(self, settings: DcmSettings, step: Step, distillation: DistillationConfig) -> tuple[Pass, ...]:
        return teacher_passes(distillation, times=settings.skip), Pass(role="student", forward=2, backward=1)

    def run(self, work: Work[DcmSettings]) -> ObjectiveResult:
        grid = work.settings
        drawn = timesteps.dcm_times(
            work.uniform("dcm_u"),
            skip=grid.skip,
            total_steps=grid.total_steps,
            shift=grid.shift,
            within=work.within(work.step.side),
        )
        first, *later = (work.as_tokens(t_B) for t_B in drawn)
        xt = trigflow.add_noise(work.samples.x0_SBP, work.noise("noise"), first)
        x, t = xt, first
        for after in later:
            F = trigflow.velocity(x, work.teacher(x, t), t)
            x, t = trigflow.euler_step(x, F, t, after), after
        target = trigflow.denoised(x, work.evaluate("student", x, t, phase="student"), t)

        def loss(v: Tensor, *, xt: Tensor, t: Tensor, target: Tensor) -> Loss:
            return Loss(elements_SBP=losses.dcm_loss(trigflow.denoised(xt, v, t), target))

        outputs = {"xt": xt, "time": first, "x_skip": x, "time_skip": t, "x0_target": target}
        given = work.network_input(xt, first)
        return work.train(given, loss, phase="student", outputs=outputs, xt=xt, t=first, target=target)


DCM = Dcm()
