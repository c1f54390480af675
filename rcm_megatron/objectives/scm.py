"""Continuous-time consistency (forward divergence): rCM (arXiv 2510.08431) Algorithm 1, sCM (arXiv 2410.11081) section 5.1."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rcm_megatron.config.declare import PositiveFloat
from rcm_megatron.diffusion import losses, trigflow
from rcm_megatron.objectives.base import STUDENT_PHASE, TEACHER_PHASE, Loss, Objective, Pass, teacher_passes

if TYPE_CHECKING:
    from torch import Tensor

    from rcm_megatron.config import DistillationConfig, RunConfig, StageConfig
    from rcm_megatron.dual import Dual
    from rcm_megatron.inputs import NetworkInput
    from rcm_megatron.objectives.plan import Step
    from rcm_megatron.objectives.work import ObjectiveResult, Work


@dataclass(frozen=True, kw_only=True)
class ScmSettings:
    """How the tangent is computed."""

    jvp_kind: Literal["exact", "semicontinuous", "finite_difference"] = "exact"
    """exact: forward-mode JVP in latents and time. semicontinuous: JVP in latents, difference in time."""
    fd_size: PositiveFloat = 1e-4
    """Step in TrigFlow time of the two difference variants; not used by `exact`."""
    scale_jvp_by_warmup: bool = False
    """Scale dF by the tangent warm-up too, as the paper's Algorithm 1 does and the released code does not."""


class Scm(Objective):
    """The student's F meets F − g, g the normalised tangent of its consistency function along the teacher's trajectory."""

    name = "scm"
    roles = ("teacher", "student")
    trains = "student"
    Settings = ScmSettings
    quantities: Mapping[str, str] = {"tangent_norm": "tangent norm (sCM)"}
    phases = (
        TEACHER_PHASE | {"dual": "forward of the student with its tangent (sCM); backward is apart"} | STUDENT_PHASE
    )
    takes_tangent = True
    has_warmup = True

    def passes(self, settings: ScmSettings, step: Step, distillation: DistillationConfig) -> tuple[Pass, ...]:
        student = {
            "exact": Pass(role="student", dual=1, backward=1),
            "semicontinuous": Pass(role="student", forward=1, dual=1, backward=1),
            "finite_difference": Pass(role="student", forward=2, backward=1),
        }
        return teacher_passes(distillation), student[settings.jvp_kind]

    def check(self, run: RunConfig, settings: ScmSettings, stage: StageConfig, path: str) -> Iterator[str]:
        if settings.jvp_kind != "exact" and run.precision.params_dtype == "bf16":
            yield (
                f"objectives.scm.jvp_kind={settings.jvp_kind} with precision.params_dtype=bf16: the difference of two bf16 passes is noise "
                "at any step size (tools/tangent_precision.py measures it); set jvp_kind to exact, or params_dtype to fp32"
            )

    def run(self, work: Work[ScmSettings]) -> ObjectiveResult:
        t = work.times("time", work.distillation.p_g, side=work.step.side)
        xt = trigflow.add_noise(work.samples.x0_SBP, work.noise("noise"), t)
        F_teacher = trigflow.velocity(xt, work.teacher(xt, t), t)
        given, before = self._points(work, xt, t, F_teacher)

        def loss(v: Tensor | Dual, **at: Tensor) -> Loss:
            F, dF = self._velocity(work.settings, v, **at)
            g, nan_1B1, norm_1B1 = losses.scm_tangent_target(
                F.detach(),
                at["F_teacher"],
                dF,
                at["xt"],
                at["t"],
                warmup_ratio=work.step.warmup_ratio,
                scale_jvp_by_warmup=work.settings.scale_jvp_by_warmup,
                sum_per_sample=work.layout.sum_per_sample,
            )
            elements = losses.scm_loss(F, F.detach(), g, nan_mask=nan_1B1)
            outputs = {"F_theta": F.detach(), "dF": dF}
            return Loss(elements_SBP=elements, nan_1B1=nan_1B1, quantities={"tangent_norm": norm_1B1}, outputs=outputs)

        phase = "student" if work.settings.jvp_kind == "finite_difference" else "dual"
        outputs = {"xt": xt, "time": t, "F_teacher": F_teacher}
        return work.train(given, loss, phase=phase, outputs=outputs, xt=xt, t=t, F_teacher=F_teacher, **before)

    def _points(
        self, work: Work[ScmSettings], xt: Tensor, t: Tensor, F_teacher: Tensor
    ) -> tuple[NetworkInput, dict[str, Tensor]]:
        """Where the student is trained; and, for the two variants that take a finite difference, its F(x, t − h)."""
        h, kind = work.settings.fd_size, work.settings.jvp_kind
        if kind == "exact":
            return work.dual_network_input(xt, t, *losses.tangent_seed(F_teacher, t)), {}
        x = losses.discrete_xt_before(xt, F_teacher, h=h) if kind == "finite_difference" else xt
        F_before = trigflow.velocity(x, work.evaluate("student", x, t - h, phase="student"), t - h)
        if kind == "finite_difference":
            return work.network_input(xt, t), {"F_before": F_before}
        t_xt, t_t = losses.tangent_seed(F_teacher, t)
        return work.dual_network_input(xt, t, t_xt, 0 * t_t), {"F_before": F_before}

    def _velocity(
        self,
        settings: ScmSettings,
        v: Tensor | Dual,
        *,
        xt: Tensor,
        t: Tensor,
        F_teacher: Tensor,
        F_before: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """F with its graph, and dF."""
        h, kind = settings.fd_size, settings.jvp_kind
        if kind == "finite_difference":
            F = trigflow.velocity(xt, v, t)
            return F, losses.discrete_dF(F.detach(), F_before, t, h=h)
        t_xt, t_t = losses.tangent_seed(F_teacher, t)
        F, dF = trigflow.velocity_jvp(xt, v.primal, t, t_xt, v.tangent, t_t if kind == "exact" else 0 * t_t)
        dF = dF.detach()
        return F, dF if kind == "exact" else losses.semicontinuous_dF(dF, F.detach(), F_before, t, h=h)


SCM = Scm()
