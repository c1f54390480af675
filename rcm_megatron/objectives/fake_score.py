"""The fake score of distribution matching: DMD2 (arXiv 2405.14867) section 4, rCM (arXiv 2510.08431) Algorithm 1."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rcm_megatron.diffusion import losses, trigflow
from rcm_megatron.objectives.base import ROLLOUT_PHASE, Loss, Objective, Pass

if TYPE_CHECKING:
    from torch import Tensor

    from rcm_megatron.config import DistillationConfig
    from rcm_megatron.objectives.base import NoSettings
    from rcm_megatron.objectives.plan import Step
    from rcm_megatron.objectives.work import ObjectiveResult, Work


class FakeScore(Objective):
    """The fake score learns to denoise what the current student generates; no guidance."""

    name = "fake_score"
    roles = ("student", "fake_score")
    trains = "fake_score"
    phases = ROLLOUT_PHASE | {"fake_score": "forward passes of the fake score: for DMD's target, or with a gradient"}

    def passes(self, settings: NoSettings, step: Step, distillation: DistillationConfig) -> tuple[Pass, ...]:
        rollout = Pass(role="student", forward=step.rollout_steps)
        return rollout, Pass(role="fake_score", forward=1, backward=1)

    def run(self, work: Work[NoSettings]) -> ObjectiveResult:
        G = work.rollout().G_SBP
        xt, t = work.noise_again(G, side=work.step.side)

        def loss(v: Tensor, *, xt: Tensor, t: Tensor, G: Tensor) -> Loss:
            x0_fake = trigflow.denoised(xt, v, t)
            elements = losses.fake_score_loss(G, x0_fake, t)
            return Loss(elements_SBP=elements, outputs={"x0_theta_fake": x0_fake.detach()})

        outputs = {"G_x0": G, "D_xt": xt, "D_time": t}
        given = work.network_input(xt, t)
        return work.train(given, loss, phase="fake_score", outputs=outputs, xt=xt, t=t, G=G)


FAKE_SCORE = FakeScore()
