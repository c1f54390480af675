"""Distribution matching (reverse divergence): DMD2 (arXiv 2405.14867), as rCM (arXiv 2510.08431) Algorithm 1 uses it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rcm_megatron.diffusion import losses, trigflow
from rcm_megatron.objectives.base import (
    ROLLOUT_PHASE,
    STUDENT_PHASE,
    TEACHER_PHASE,
    Loss,
    Objective,
    Pass,
    teacher_passes,
)

if TYPE_CHECKING:
    from torch import Tensor

    from rcm_megatron.config import DistillationConfig, RunConfig, StageConfig
    from rcm_megatron.objectives.base import NoSettings
    from rcm_megatron.objectives.plan import Step
    from rcm_megatron.objectives.work import ObjectiveResult, Work


class Dmd(Objective):
    """A rollout of the student moves to where the teacher's score exceeds the fake one's.

    The target needs the finished rollout, fake score and teacher; then the rollout's last step runs once more with gradient.
    """

    name = "dmd"
    roles = ("teacher", "student", "fake_score")
    trains = "student"
    companions = ("fake_score",)
    phases = (
        TEACHER_PHASE
        | ROLLOUT_PHASE
        | {"fake_score": "forward passes of the fake score: for DMD's target, or with a gradient"}
        | STUDENT_PHASE
    )
    second_time = "follows"
    waits_for_warmup = True

    def passes(self, settings: NoSettings, step: Step, distillation: DistillationConfig) -> tuple[Pass, ...]:
        student = Pass(role="student", forward=step.rollout_steps, again=1, backward=1)
        return student, Pass(role="fake_score", forward=1), teacher_passes(distillation)

    def check(self, run: RunConfig, settings: NoSettings, stage: StageConfig, path: str) -> Iterator[str]:
        distillation, where = run.distillation, f"{path}.losses.dmd trains the student where a rollout ends, which"
        for side, choices in run.sides.get("student", {}).items() if distillation.expert_boundary is not None else ():
            if choices:
                continue
            if distillation.fixed_rollout_times is None:
                yield f"{where} with distillation.max_rollout_steps=1 is never on the {side}-noise side, need at least 2; set it to 4"
            else:
                times = list(distillation.fixed_rollout_times)
                yield (
                    f"{where} with distillation.fixed_rollout_times={times} in {distillation.max_rollout_steps} steps is never on the "
                    f"{side}-noise side of expert_boundary={distillation.expert_boundary}; set it to null, or other times"
                )

    def run(self, work: Work[NoSettings]) -> ObjectiveResult:
        simulated = work.rollout(side=work.step.side)
        G = simulated.G_SBP
        xt, t = work.noise_again(G)
        fake = trigflow.denoised(xt, work.evaluate("fake_score", xt, t, phase="fake_score"), t)
        teacher = trigflow.denoised(xt, work.teacher(xt, t), t)

        def loss(v: Tensor, *, xt: Tensor, t: Tensor, G: Tensor, fake: Tensor, teacher: Tensor, num: Tensor) -> Loss:
            grad, nan_1B1 = losses.dmd_gradient(
                fake, teacher, G, num_elements=num, sum_per_sample=work.layout.sum_per_sample
            )
            again = trigflow.denoised(xt, v, t)
            return Loss(elements_SBP=losses.dmd_loss(again, grad, nan_mask=nan_1B1), nan_1B1=nan_1B1)

        outputs = {"G_x0": G, "D_xt": xt, "D_time": t, "x0_theta_fake": fake, "x0_theta_teacher": teacher}
        return work.train(
            work.network_input(simulated.xt_SBP, simulated.t_1B1, s_1B1=0 * simulated.t_1B1),
            loss,
            phase="student",
            outputs=outputs,
            xt=simulated.xt_SBP,
            t=simulated.t_1B1,
            G=G,
            fake=fake,
            teacher=teacher,
            num=work.generated_elements(),
        )


DMD = Dmd()
