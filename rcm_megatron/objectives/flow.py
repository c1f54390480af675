"""Flow matching (arXiv 2210.02747): trains the student network as a teacher, with caption dropout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rcm_megatron.config import TimeDistribution
from rcm_megatron.config.declare import Fraction
from rcm_megatron.diffusion import losses, trigflow
from rcm_megatron.objectives.base import STUDENT_PHASE, Loss, Objective, Pass

if TYPE_CHECKING:
    from torch import Tensor

    from rcm_megatron.config import DistillationConfig, RunConfig, StageConfig
    from rcm_megatron.objectives.plan import Step
    from rcm_megatron.objectives.work import ObjectiveResult, Work


@dataclass(frozen=True, kw_only=True)
class FlowSettings:
    """To train or finetune a teacher."""

    times: TimeDistribution = TimeDistribution(kind="uniform_shift", shift=1.0)
    caption_dropout: Fraction = 0.1
    """Fraction of samples trained on the empty caption, which classifier-free guidance needs."""


class Flow(Objective):
    """The network's v meets noise − x0."""

    name = "flow"
    roles = ("student",)
    trains = "student"
    Settings = FlowSettings
    phases = STUDENT_PHASE

    def passes(self, settings: FlowSettings, step: Step, distillation: DistillationConfig) -> tuple[Pass, ...]:
        return (Pass(role="student", forward=1, backward=1),)

    def check(self, run: RunConfig, settings: FlowSettings, stage: StageConfig, path: str) -> Iterator[str]:
        if len(stage.losses) > 1:
            weight = stage.losses[self.name]
            yield f"{path}.losses: flow={weight} trains a teacher and needs a stage of its own; split this one"

    def null_text(
        self, settings: FlowSettings, distillation: DistillationConfig
    ) -> Literal["negative", "empty"] | None:
        return "empty" if settings.caption_dropout > 0 else None

    def run(self, work: Work[FlowSettings]) -> ObjectiveResult:
        samples, x0 = work.samples, work.samples.x0_SBP
        t, noise = work.times("flow_time", work.settings.times, side=work.step.side), work.noise("flow_noise")
        xt = trigflow.add_noise(x0, noise, t)
        keeps_caption_B = (work.uniform("flow_caption") >= work.settings.caption_dropout).to(samples.device)
        text_LBD = samples.text_LBD.where(keeps_caption_B[None, :, None], samples.null_text_LBD)

        def loss(v: Tensor, *, x0: Tensor, noise: Tensor) -> Loss:
            return Loss(elements_SBP=work.layout.mask(losses.flow_matching_loss(v, x0, noise)))

        given = work.network_input(xt, t, text_LBD=text_LBD)
        return work.train(given, loss, phase="student", outputs={"xt": xt, "time": t}, x0=x0, noise=noise)


FLOW = Flow()
