"""The objectives of rCM as pure functions on any layout.

A loss comes back element by element, on the elements that the caller holds: the caller sums them. Where a total over
the whole sample is needed inside, `sum_per_sample` does it: it takes a tensor in the data's layout and returns the sum
over everything but the batch, over all ranks, in a shape that broadcasts against the data (see `batch_sum`).
Times `t` broadcast against the data. All arithmetic is fp64.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

SumPerSample = Callable[[Tensor], Tensor]

TANGENT_NORM_OFFSET = 0.1
"""c in g / (||g|| + c). sCM section 4.2."""

DMD_MIN_NORMALIZER = 1e-5


def batch_sum(batch_dim: int) -> SumPerSample:
    """A `sum_per_sample` for data that is whole on this process, with the batch in dimension `batch_dim`."""

    def total(x: Tensor) -> Tensor:
        return x.sum(dim=[dim for dim in range(x.ndim) if dim != batch_dim], keepdim=True)

    return total


def nonfinite_samples(*tensors: Tensor, sum_per_sample: SumPerSample) -> Tensor:
    """True for each sample that holds a NaN or an infinity in any of the tensors, in the shape of `sum_per_sample`."""
    bad = torch.stack([~torch.isfinite(x) for x in tensors]).any(dim=0)
    return sum_per_sample(bad.double()) > 0


def tangent_seed(F_teacher: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The tangents (t_xt, t_t) = (cos sin F_teacher, cos sin) at which dF is the JVP of F. sCM section 5.1."""
    t = t.double()
    cos_sin = torch.cos(t) * torch.sin(t)
    return cos_sin * F_teacher.double(), cos_sin


def semicontinuous_dF(dF_x: Tensor, F: Tensor, F_before: Tensor, t: Tensor, *, h: float) -> Tensor:
    """dF with the time derivative by a backward difference.

    dF_x is the JVP of F at (xt, t) with tangents (cos sin F_teacher, 0), F_before = F(xt, t - h):
    dF = dF_x + cos sin (cos(h) F - F_before) / sin(h).
    """
    return dF_x.double() + discrete_dF(F, F_before, t, h=h)


def discrete_dF(F: Tensor, F_before: Tensor, t: Tensor, *, h: float) -> Tensor:
    """dF by a backward difference along the teacher's trajectory: cos sin (cos(h) F - F_before) / sin(h).

    F_before = F(`discrete_xt_before`, t - h).
    """
    t = t.double()
    return torch.cos(t) * torch.sin(t) * (math.cos(h) * F.double() - F_before.double()) / math.sin(h)


def discrete_xt_before(xt: Tensor, F_teacher: Tensor, *, h: float) -> Tensor:
    """The point at t - h on the teacher's trajectory, cos(h) xt - sin(h) F_teacher."""
    return math.cos(h) * xt.double() - math.sin(h) * F_teacher.double()


def scm_tangent(
    F_student: Tensor,
    F_teacher: Tensor,
    dF: Tensor,
    xt: Tensor,
    t: Tensor,
    *,
    warmup_ratio: float,
    scale_jvp_by_warmup: bool = False,
) -> Tensor:
    """g before its normalisation, -cos sqrt(1 - r^2 sin^2) (F - F_teacher) - (r cos sin xt + dF).

    sCM section 5.1 with the tangent warm-up r of rCM. The released code leaves dF as it is; the paper's Algorithm 1
    multiplies it by r too (`scale_jvp_by_warmup`).
    """
    t = t.double()
    cos, sin, r = torch.cos(t), torch.sin(t), warmup_ratio
    dF = r * dF.double() if scale_jvp_by_warmup else dF.double()
    distance = F_student.detach().double() - F_teacher.double()
    return -cos * torch.sqrt(1 - r**2 * sin**2) * distance - (r * cos * sin * xt.double() + dF)


def scm_tangent_target(
    F_student: Tensor,
    F_teacher: Tensor,
    dF: Tensor,
    xt: Tensor,
    t: Tensor,
    *,
    warmup_ratio: float,
    scale_jvp_by_warmup: bool = False,
    sum_per_sample: SumPerSample,
) -> tuple[Tensor, Tensor, Tensor]:
    """(g, nan_mask, tangent_norm): g / (||g|| + 0.1) over all elements of the sample; see `scm_tangent`.

    nan_mask, in the shape of `sum_per_sample`, marks samples with a non-finite g or F, whose g is set to 0;
    tangent_norm is ||g|| before the normalisation, 0 for those. Nothing here carries gradient.
    """
    with torch.no_grad():
        g = scm_tangent(
            F_student,
            F_teacher,
            dF,
            xt,
            t,
            warmup_ratio=warmup_ratio,
            scale_jvp_by_warmup=scale_jvp_by_warmup,
        )
        nan_mask = nonfinite_samples(g, F_student.detach(), sum_per_sample=sum_per_sample)
        g = torch.where(nan_mask, 0.0, g)
        tangent_norm = torch.sqrt(sum_per_sample(g**2))
        return g / (tangent_norm + TANGENT_NORM_OFFSET), nan_mask, tangent_norm


def scm_loss(F: Tensor, F_detached: Tensor, g: Tensor, *, nan_mask: Tensor | None = None) -> Tensor:
    """(F - sg(F) - g)^2 element by element, local; sCM Eq. 8. Masked samples count 0.

    The mask keeps the loss finite, but cannot protect the weights from a NaN in F itself (0 * NaN in the network's
    backward): the caller drops samples that are not finite before the network sees them, and refuses non-finite gradients.
    """
    residual = F.double() - F_detached.detach().double() - g.double()
    return _masked(residual, nan_mask) ** 2


def dcm_loss(x0_student: Tensor, x0_target: Tensor) -> Tensor:
    """(x0(xt, t_0) - sg x0(x_skip, t_skip))^2 element by element: discrete consistency distillation."""
    return (x0_student.double() - x0_target.detach().double()) ** 2


def dmd_gradient(
    x0_fake: Tensor, x0_teacher: Tensor, G: Tensor, *, num_elements: int | Tensor, sum_per_sample: SumPerSample
) -> tuple[Tensor, Tensor]:
    """(grad, nan_mask): (x0_fake - x0_teacher) / max(mean |G - x0_teacher|, 1e-5). DMD2 (arXiv 2405.14867).

    `num_elements` is the true element count of a sample over all ranks, without padding and without what the networks
    are given (there G is x0_teacher, and would dilute the mean): a number, or `[1, b, 1]`. Samples with a non-finite
    gradient or G are marked in nan_mask, and their grad is 0. Nothing here carries gradient.
    """
    with torch.no_grad():
        x0_teacher, G = x0_teacher.double(), G.double()
        normalizer = (sum_per_sample((G - x0_teacher).abs()) / num_elements).clamp(min=DMD_MIN_NORMALIZER)
        grad = (x0_fake.double() - x0_teacher) / normalizer
        nan_mask = nonfinite_samples(grad, G, sum_per_sample=sum_per_sample)
        return torch.where(nan_mask, 0.0, grad), nan_mask


def dmd_loss(G: Tensor, grad: Tensor, *, nan_mask: Tensor | None = None) -> Tensor:
    """(G - sg(G - grad))^2 element by element; its gradient into G is 2 grad. Masked samples count 0."""
    G = G.double()
    return _masked(G - (G - grad.double()).detach(), nan_mask) ** 2


def fake_score_loss(G: Tensor, x0_fake: Tensor, t: Tensor) -> Tensor:
    """(sg(G) - x0_fake)^2 / sin(t)^2 element by element: the fake score's denoising loss on generated samples.

    Equal to the squared error of the TrigFlow velocity. A time of exactly 0, where numerator and denominator vanish,
    counts 0.
    """
    weight = torch.sin(t.double()).square().clamp(min=1e-30)
    return (G.detach().double() - x0_fake.double()) ** 2 / weight


def flow_matching_loss(v: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """(v - (noise - x0))^2 element by element, v the network's output at `precondition(add_noise(x0, noise, t), t)`.

    That input is (1 - s) x0 + s noise with timestep 1000 s. Flow matching (arXiv 2210.02747), Eq. 23.
    """
    return (v.double() - (noise.double() - x0.double())) ** 2


def _masked(x: Tensor, nan_mask: Tensor | None) -> Tensor:
    return x if nan_mask is None else torch.where(nan_mask, 0.0, x)
