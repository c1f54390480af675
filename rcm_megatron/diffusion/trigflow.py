"""TrigFlow on top of a rectified-flow network.

xt = cos(t) x0 + sin(t) noise with t in [0, pi/2]; the network was trained on x_s = (1 - s) x0 + s noise and predicts
v = noise - x0. Dividing xt by cos(t) + sin(t) turns one into the other, with s = sin(t) / (cos(t) + sin(t)).

Everything here is computed in fp64, whatever comes in. The network's timestep is rounded to fp32 and never below:
bf16 has a spacing of 4 near 1000. All tensors may have any layout, `t` any shape that broadcasts.
Sources: sCM (arXiv 2410.11081) sections 3 and 5.1, rCM (arXiv 2510.08431) section 3.
"""

import torch
from torch import Tensor

TIMESTEP_SCALE = 1000.0
"""The network sees 1000 s for the rectified-flow time s."""


def _cos_sin(t: Tensor) -> tuple[Tensor, Tensor]:
    t = t.double()
    return torch.cos(t), torch.sin(t)


def to_trigflow(s: Tensor) -> Tensor:
    """TrigFlow time t = atan(s / (1 - s)) of the rectified-flow time s in [0, 1]; keeps the dtype of s."""
    return torch.atan2(s, 1 - s)


def to_rf(t: Tensor) -> Tensor:
    """Rectified-flow time s = sin(t) / (cos(t) + sin(t)), fp64; the inverse of `to_trigflow`."""
    cos, sin = _cos_sin(t)
    return sin / (cos + sin)


def add_noise(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """xt = cos(t) x0 + sin(t) noise, fp64. sCM Eq. 3. Also the re-noising step of a rollout."""
    cos, sin = _cos_sin(t)
    return cos * x0.double() + sin * noise.double()


def precondition(xt: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The network's inputs: (c_in xt in fp64, c_noise in fp32 with the shape of t).

    c_in = 1 / (cos + sin), c_noise = 1000 sin / (cos + sin). The caller casts the first to the network's dtype.
    """
    cos, sin = _cos_sin(t)
    return xt.double() / (cos + sin), (TIMESTEP_SCALE * sin / (cos + sin)).float()


def precondition_jvp(xt: Tensor, t: Tensor, t_xt: Tensor, t_t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`precondition` and its tangent: (x_in, timestep, t_x_in, t_timestep).

    d c_in / dt = (sin - cos) / (cos + sin)^2 and d c_noise / dt = 1000 / (cos + sin)^2.
    """
    cos, sin = _cos_sin(t)
    x_in, timestep = precondition(xt, t)
    scale = 1 / (cos + sin)
    t_x_in = scale * t_xt.double() + (sin - cos) * scale * t_t.double() * x_in
    return x_in, timestep, t_x_in, (TIMESTEP_SCALE * scale**2 * t_t.double()).float()


def velocity(xt: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """TrigFlow velocity F = ((cos - sin) xt + v) / (cos + sin) of the network's output v, fp64.

    Equal to (cos xt - x0) / sin without its 0/0 at t = 0.
    """
    cos, sin = _cos_sin(t)
    return ((cos - sin) * xt.double() + v.double()) / (cos + sin)


def velocity_jvp(xt: Tensor, v: Tensor, t: Tensor, t_xt: Tensor, t_v: Tensor, t_t: Tensor) -> tuple[Tensor, Tensor]:
    """`velocity` and its tangent: (F, tangent_F).

    tangent_F = (t_v + (cos - sin)(t_xt - F t_t)) / (cos + sin) - xt t_t.
    """
    cos, sin = _cos_sin(t)
    F, t_t = velocity(xt, v, t), t_t.double()
    tangent_F = (t_v.double() + (cos - sin) * (t_xt.double() - F * t_t)) / (cos + sin) - xt.double() * t_t
    return F, tangent_F


def denoised(xt: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """x0 = c_skip xt + c_out v = (xt - sin v) / (cos + sin) of the network's output v, fp64."""
    cos, sin = _cos_sin(t)
    return (xt.double() - sin * v.double()) / (cos + sin)


def guided(conditional: Tensor, unconditional: Tensor, *, scale: float) -> Tensor:
    """Classifier-free guidance, unconditional + scale (conditional - unconditional); for v, F and x0 alike."""
    return unconditional + scale * (conditional - unconditional)


def needs_guidance(scale: float) -> bool:
    """Whether a guidance scale takes the unconditional pass: only above 1."""
    return scale > 1.0


def euler_step(x: Tensor, F: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """One Euler step of the TrigFlow ODE dx/dt = F from t down to t_next: x - (t - t_next) F, fp64."""
    return x.double() - (t.double() - t_next.double()) * F.double()
