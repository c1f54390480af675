"""What the objectives of two-time flow maps share: settings, the draw of (t, s), and the squared error towards a tangent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rcm_megatron.config import TimeDistribution
from rcm_megatron.config.declare import Fraction, NotNegativeFloat, PositiveFloat
from rcm_megatron.diffusion import flow_maps, losses, trigflow
from rcm_megatron.objectives.base import Loss, Objective

if TYPE_CHECKING:
    from torch import Tensor

    from rcm_megatron.dual import Dual
    from rcm_megatron.objectives.work import ObjectiveResult, Work


@dataclass(frozen=True, kw_only=True)
class TwoTimesSettings:
    """Two draws of a sample, sorted: t is the later, s the earlier; two shares of all samples have another s."""

    times: TimeDistribution | None = None
    """Of both draws. null: distillation.p_g."""
    share_equal: Fraction = 0.25
    """Samples with s = t, whose target is the velocity itself: the anchor."""
    share_zero: Fraction = 0.25
    """Samples with s = 0, whose t is the first draw: 1 is the objective of a consistency model."""
    normalisation: Literal["norm", "adaptive", "none"] = "norm"
    """Of the tangent g of a sample. norm: g / (||g|| + norm_offset), as sCM and Align Your Flow. adaptive: the squared error is divided by
    (||g||^2 + adaptive_offset) ** adaptive_power, as MeanFlow. none: the squared error as it is."""
    norm_offset: PositiveFloat = 0.1
    adaptive_offset: PositiveFloat = 0.01
    adaptive_power: NotNegativeFloat = 1.0

    def check(self, path: str) -> Iterator[str]:
        """The shares are of one batch."""
        if self.share_equal + self.share_zero > 1:
            yield (
                f"{path}.share_equal={self.share_equal} and {path}.share_zero={self.share_zero} must be at most 1 together; lower one"
            )

    def scales(self, norm: Tensor) -> tuple[Tensor, Tensor]:
        """(scale of the tangent, weight of the squared error) of samples whose tangents have this norm."""
        if self.normalisation == "norm":
            return flow_maps.norm_scale(norm, offset=self.norm_offset)
        power = self.adaptive_power if self.normalisation == "adaptive" else 0.0
        return flow_maps.adaptive_scale(norm, offset=self.adaptive_offset, power=power)


@dataclass(frozen=True, kw_only=True)
class EulerianSettings(TwoTimesSettings):
    """Of an objective whose tangent moves with the sample."""

    space: Literal["trigflow", "rf"] = "trigflow"
    """Whose regression it is. trigflow: of F, with sCM's tangent, cos(t - s) df/dt; rf: of the network's average velocity, with MeanFlow's,
    (m(t)^2 / m(s)) df/dt, m = cos + sin. Both have one direction."""


class TwoTimes(Objective):
    """An objective that trains the student to be a flow map."""

    trains = "student"
    quantities: Mapping[str, str] = {"tangent_norm": "tangent norm (flow map)"}
    takes_tangent = True
    has_warmup = True
    second_time = "needs"


def draw_times(work: Work[Any]) -> tuple[Tensor, Tensor]:
    """(t, s) ``[1, B, 1]`` with s <= t, of `TwoTimesSettings`; of a student that is two networks t lies on the side that is trained."""
    import torch

    settings, side = work.settings, work.step.side
    law = settings.times or work.distillation.p_g
    first = work.times("time", law, side=side)
    if settings.share_zero == 1:
        return first, torch.zeros_like(first)
    second = work.times("second_time", law, side=side if side == "low" else None)
    u = work.as_tokens(work.uniform("kind_of_times"))
    is_zero, is_equal = u < settings.share_zero, u >= 1 - settings.share_equal
    later, earlier = torch.maximum(first, second), torch.minimum(first, second)
    s = earlier.where(~is_equal, later).where(~is_zero, 0.0)
    return later.where(~is_zero, first), s


def towards(work: Work[Any], F: Tensor, g: Tensor, *, factor: Tensor | None = None, **outputs: Tensor) -> Loss:
    """|F - sg F - g|^2 with g normalised; ``factor`` [1, B, 1] turns F into what g is a tangent of."""
    g, nan_1B1, norm_1B1 = flow_maps.finite_tangent(g, F, sum_per_sample=work.layout.sum_per_sample)
    scale, weight = work.settings.scales(norm_1B1)
    value = F if factor is None else factor * F
    elements = weight * losses.scm_loss(value, value.detach(), scale * g, nan_mask=nan_1B1)
    outputs = {"F_theta": F.detach(), "tangent": g} | outputs
    return Loss(elements_SBP=elements, nan_1B1=nan_1B1, quantities={"tangent_norm": norm_1B1}, outputs=outputs)


def train_eulerian(
    work: Work[EulerianSettings], xt: Tensor, t: Tensor, s: Tensor, F_teacher: Tensor
) -> ObjectiveResult:
    """Train f(x, t, s) to stay where it is while (x, t) moves along F_teacher: EMD, Align Your Flow (arXiv 2506.14603) section 3."""
    in_rf, ratio = work.settings.space == "rf", work.step.warmup_ratio

    def seed(F_teacher: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return flow_maps.average_velocity_seed(F_teacher, t, s) if in_rf else losses.tangent_seed(F_teacher, t - s)

    def loss(v: Dual, *, xt: Tensor, t: Tensor, s: Tensor, F_teacher: Tensor) -> Loss:
        t_xt, t_t = seed(F_teacher, t, s)
        F, dF = trigflow.velocity_jvp(xt, v.primal, t, t_xt, v.tangent, t_t)
        at = (F.detach(), F_teacher, dF.detach(), xt)
        if not in_rf:
            return towards(work, F, losses.scm_tangent(*at, t - s, warmup_ratio=ratio), dF=dF.detach())
        h = flow_maps.average_velocity_tangent(*at, t, s, warmup_ratio=ratio)
        return towards(work, F, h, factor=t.cos() + t.sin(), dF=dF.detach())

    t_xt, t_t = seed(F_teacher, t, s)
    given = work.dual_network_input(xt, t, t_xt, t_t, s=s)
    outputs = {"xt": xt, "time": t, "second_time": s, "F_teacher": F_teacher}
    return work.train(given, loss, phase="dual", outputs=outputs, xt=xt, t=t, s=s, F_teacher=F_teacher)
