"""Two-time flow maps f(x, t, s) = cos(d) x - sin(d) F(x, t, s), d = t - s, as pure functions on any layout; all arithmetic is fp64.

F(x, t, t) is the velocity, s = 0 sCM's consistency function; the Eulerian tangent is that of losses.py with d in the place of t.
The network returns the average velocity u of rectified flow between the two times, MeanFlow (arXiv 2505.13447) Eq. 3:
f / m(s) = x / m(t) - (sigma_t - sigma_s) u with m = cos + sin and sigma = sin / m, exactly; trigflow.velocity makes F of it whatever s is.
Eulerian (EMD) and Lagrangian (LMD) distillation of such maps: Align Your Flow (arXiv 2506.14603) section 3.
"""

import torch
from torch import Tensor

from rcm_megatron.diffusion import losses
from rcm_megatron.diffusion.losses import SumPerSample
from rcm_megatron.diffusion.trigflow import TIMESTEP_SCALE


def flow_map(xt: Tensor, F: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """f(x, t, s) = cos(t - s) x - sin(t - s) F, the sample at s."""
    d = t.double() - s.double()
    return torch.cos(d) * xt.double() - torch.sin(d) * F.double()


def interval(t: Tensor, s: Tensor) -> Tensor:
    """1000 (sigma_t - sigma_s) = 1000 sin(t - s) / (m(t) m(s)) as the network is given it, fp32; exactly 0 at s = t."""
    t, s = t.double(), s.double()
    return (TIMESTEP_SCALE * torch.sin(t - s) / (_m(t) * _m(s))).float()


def interval_jvp(t: Tensor, s: Tensor, t_t: Tensor, t_s: Tensor) -> tuple[Tensor, Tensor]:
    """`interval` and its tangent 1000 (t_t / m(t)^2 - t_s / m(s)^2), fp32."""
    t_interval = t_t.double() / _m(t.double()) ** 2 - t_s.double() / _m(s.double()) ** 2
    return interval(t, s), (TIMESTEP_SCALE * t_interval).float()


def data_velocity(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """dx/dt = cos(t) noise - sin(t) x0 of one sample's line; its mean given x is the velocity."""
    t = t.double()
    return torch.cos(t) * noise.double() - torch.sin(t) * x0.double()


def average_velocity_seed(F_teacher: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """The tangents (t_xt, t_t) = sin(d) (F_teacher, 1) for `average_velocity_tangent`."""
    sin = torch.sin(t.double() - s.double())
    return sin * F_teacher.double(), sin


def average_velocity_tangent(
    F: Tensor, F_teacher: Tensor, dF: Tensor, xt: Tensor, t: Tensor, s: Tensor, *, warmup_ratio: float
) -> Tensor:
    """h = v_teacher - u - r (sigma_t - sigma_s) du/dsigma: MeanFlow (arXiv 2505.13447) Eq. 9 and 11, what u lacks to its target.

    Of TrigFlow's numbers (dF at the tangents of `average_velocity_seed`): at r = 1 it is
    m(t)^2 / m(s) (-cos(d) (F - F_teacher) - sin(d) xt - dF), at r = 0 m(t) (F_teacher - F).
    """
    t, s = t.double(), s.double()
    d, distance = t - s, F.detach().double() - F_teacher.double()
    whole = -torch.cos(d) * distance - torch.sin(d) * xt.double() - dF.double()
    return warmup_ratio * _m(t) ** 2 / _m(s) * whole - (1 - warmup_ratio) * _m(t) * distance


def lagrangian_tangent(
    F: Tensor, F_teacher: Tensor, dF: Tensor, xt: Tensor, t: Tensor, s: Tensor, *, warmup_ratio: float
) -> Tensor:
    """g = F_teacher(f, s) - df/ds, df/ds = sin(d) xt + cos(d) F - sin(d) dF/ds: LMD, Align Your Flow (arXiv 2506.14603) section 3.

    dF is sin(d) dF/ds, the JVP of F at the tangents (0, 0, sin(d)) of (x, t, s). With the warm-up r, as in `losses.scm_tangent`:
    F_teacher - sqrt(1 - r^2 sin(d)^2) F - r (sin(d) xt - dF).
    """
    sin, r = torch.sin(t.double() - s.double()), warmup_ratio
    F, F_teacher = F.detach().double(), F_teacher.double()
    return F_teacher - torch.sqrt(1 - r**2 * sin**2) * F - r * (sin * xt.double() - dF.double())


def norm_scale(norm: Tensor, *, offset: float) -> tuple[Tensor, Tensor]:
    """(scale of the tangent, weight of the squared error) of g / (||g|| + offset). sCM (arXiv 2410.11081) section 4.2."""
    return 1 / (norm + offset), torch.ones_like(norm)


def adaptive_scale(norm: Tensor, *, offset: float, power: float) -> tuple[Tensor, Tensor]:
    """(1, 1 / (||g||^2 + offset)^power), MeanFlow (arXiv 2505.13447) Eq. 22."""
    return torch.ones_like(norm), 1 / (norm**2 + offset) ** power


@torch.no_grad()
def finite_tangent(g: Tensor, F: Tensor, *, sum_per_sample: SumPerSample) -> tuple[Tensor, Tensor, Tensor]:
    """(g, nan_mask, ||g||): samples with a non-finite g or F are marked, and their g is 0."""
    nan_mask = losses.nonfinite_samples(g, F.detach(), sum_per_sample=sum_per_sample)
    g = torch.where(nan_mask, 0.0, g)
    return g, nan_mask, torch.sqrt(sum_per_sample(g**2))


def _m(t: Tensor) -> Tensor:
    return torch.cos(t) + torch.sin(t)
