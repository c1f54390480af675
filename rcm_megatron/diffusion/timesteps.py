"""Time distributions, the times of rollouts and discrete distillation, and the alternation of a network and its companions.

Draws come in as tensors, times go out in TrigFlow (0 ... pi/2), fp64, shape `[b]` unless stated.

sigma_max (80 for Wan2.1 1.3B, 200 for 14B) is the noise level sigma = tan(t) at which *sampling* starts. NVlabs/rcm
(5b41aa9) starts the student's sampler at t = atan(sigma_max) (README there: larger values "reduce diversity but may
enhance quality"), and the teacher's, whose own script uses 5000, at s = sigma_max / (1 + sigma_max). The losses do not
use it: p_G is not clamped, and rollouts in training start from pure noise at t = pi/2. So it is optional here:
`start_time(None)` is the convention of the losses and of the golden files; `start_time(80.0)` is NVlabs' sampler.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rcm_megatron.diffusion.trigflow import to_rf, to_trigflow

PURE_NOISE_TIME = float(torch.tensor(math.pi / 2, dtype=torch.float32))
"""pi/2 rounded to fp32, the first time of a rollout; 4e-8 above pi/2 in fp64."""

STUDENT_MID_TIMES = (1.5, 1.4, 1.0)
"""Times between the steps of the student's sampler, for up to four steps."""


def shift_rf(s: Tensor, *, shift: float) -> Tensor:
    """shift s / (1 + (shift - 1) s): moves rectified-flow times towards noise, clamped to [0, 1]; keeps the dtype."""
    return (shift * s / (1 + (shift - 1) * s)).clamp(0.0, 1.0)


@dataclass(frozen=True)
class Within:
    """The TrigFlow times from ``low`` to ``high`` of [0, pi/2]: where one of two networks is the one that is asked.

    Distributions are cut to it by their inverse CDF, so that a sample's draw moves its time monotonically, on whichever side.
    """

    low: float
    high: float

    def cut(self, u: Tensor, cdf: Callable[[float], float]) -> Tensor:
        """u ~ U[0, 1) moved to the part of the distribution with ``cdf`` (of TrigFlow time) that lies within."""
        low, high = cdf(self.low), cdf(self.high)
        return low + u * (high - low)

    def clamp(self, t: Tensor) -> Tensor:
        """Against rounding at the ends."""
        return t.clamp(self.low, self.high)


def lognormal_time(z: Tensor, *, mean: float, std: float, within: Within | None = None) -> Tensor:
    """p_G: t = atan(exp(std z + mean)) of standard normal z, any shape."""
    z = z.double()
    if within is None:
        return torch.atan(torch.exp(std * z + mean))

    def cdf(t: float) -> float:
        tan = math.tan(t) if t < math.pi / 2 else math.inf
        return 0.0 if tan == 0 else float(torch.special.ndtr(torch.tensor((math.log(tan) - mean) / std).double()))

    z = torch.special.ndtri(within.cut(torch.special.ndtr(z), cdf))
    return within.clamp(torch.atan(torch.exp(std * z + mean)))


def uniform_shift_time(u: Tensor, *, shift: float = 5.0, within: Within | None = None) -> Tensor:
    """p_D: rectified-flow time u ~ U[0, 1) shifted towards noise, as a TrigFlow time; any shape."""
    u = u.double()
    if within is None:
        return to_trigflow(shift_rf(u, shift=shift))
    return within.clamp(to_trigflow(shift_rf(within.cut(u, partial(_unshifted, shift=shift)), shift=shift)))


def _unshifted(t: float, *, shift: float) -> float:
    """The rectified-flow time that `shift_rf` moves to that of TrigFlow time ``t``."""
    s = float(to_rf(torch.tensor(t, dtype=torch.float64)))
    return s / (shift - (shift - 1) * s)


def start_time(sigma_max: float | None = None) -> float:
    """First time of a rollout or of the student's sampler: pi/2 (in fp32), or atan(sigma_max). Raises ValueError for sigma_max <= 0."""
    if sigma_max is None:
        return PURE_NOISE_TIME
    if not sigma_max > 0:
        raise ValueError(f"got sigma_max={sigma_max}, need a value above 0 such as 80, or None for pure noise")
    return math.atan(sigma_max)


def rollout_times(
    *,
    batch_size: int,
    steps: int,
    draw: Callable[[str], Tensor],
    mid_times: Sequence[float] | None = None,
    sigma_max: float | None = None,
) -> list[Tensor]:
    """Times of an n-step rollout (backward simulation), n tensors `[b]`, never increasing.

    The first is `start_time(sigma_max)`. Each later one is a draw from p_D (`draw("rollout_time/{j}")`, TrigFlow times
    `[b]`, j = 0 ... n-2), but at most the previous time of that sample; or, with `mid_times`, the first n-1 of those,
    rounded to fp32.
    """
    times = [torch.full((batch_size,), start_time(sigma_max), dtype=torch.float64)]
    if mid_times is not None:
        fixed = torch.tensor(_mid_times(steps, mid_times), dtype=torch.float32).double()
        return times + [t.expand(batch_size) for t in fixed]
    for j in range(steps - 1):
        drawn = draw(f"rollout_time/{j}")
        times.append(torch.minimum(drawn, times[-1].to(drawn.device)))
    return times


def _mid_times(steps: int, mid_times: Sequence[float]) -> tuple[float, ...]:
    """The n-1 times between n steps, checked."""
    if not 1 <= steps <= len(mid_times) + 1:
        raise ValueError(
            f"got steps={steps} with {len(mid_times)} mid times, need 1 <= steps <= {len(mid_times) + 1}; "
            "give one mid time for every step but the first"
        )
    return tuple(mid_times[: steps - 1])


def sampler_times(*, steps: int, mid_times: Sequence[float] = STUDENT_MID_TIMES, sigma_max: float | None = None):
    """The student sampler's n TrigFlow times as floats: `start_time(sigma_max)`, then the first n-1 mid times."""
    return (start_time(sigma_max), *_mid_times(steps, mid_times))


def dcm_times(u: Tensor, *, skip: int, total_steps: int, shift: float = 5.0, within: Within | None = None) -> Tensor:
    """Times of discrete consistency distillation, `[skip + 1, *u.shape]`, falling along the first dimension.

    1 - u (1 - skip/total) - j/total for j = 0 ... skip and u ~ U[0, 1), shifted, as TrigFlow times. Computed in fp32
    (as the official code does), returned in fp64. ``within``: where the first of them lies, as far as the grid has such.
    Raises ValueError unless 1 <= skip <= total_steps.
    """
    if not 1 <= skip <= total_steps:
        raise ValueError(f"got skip={skip}, total_steps={total_steps}; need 1 <= skip <= total_steps")
    span = 1 - skip / total_steps
    if within is not None and span > 0:
        # 1 - u is cut, because the first time falls in u.
        u = 1 - within.cut(1 - u, lambda t: min(max(0.0, 1 - (1 - _unshifted(t, shift=shift)) / span), 1.0))
    first = 1 - u.float() * span
    s = torch.stack([first - j / total_steps for j in range(skip + 1)])
    return to_trigflow(shift_rf(s, shift=shift)).double()


def tangent_warmup_ratio(iteration: int, *, warmup: int) -> float:
    """r = min(1, iteration / warmup), and 1 without warm-up. rCM Algorithm 1."""
    return min(1.0, iteration / warmup) if warmup > 0 else 1.0


def is_student_step(iteration: int, *, warmup: int, student_update_freq: int) -> bool:
    """Whether the student is updated (else a companion): in the warm-up, then every `student_update_freq` iterations.

    Pure sCM, without a companion, is student_update_freq = 1.
    """
    return iteration < warmup or (iteration - warmup) % student_update_freq == 0


def student_updates_before(iteration: int, *, warmup: int, student_update_freq: int) -> int:
    """E(i), the count of student steps before the student step `iteration`. rCM Algorithm 1.

    On iterations of companions it counts the student steps up to, but without, the latest one: one less than have been done.
    """
    return iteration if iteration < warmup else warmup + (iteration - warmup) // student_update_freq


def companion_updates_before(iteration: int, *, warmup: int, student_update_freq: int) -> int:
    """i - E(i) - 1, the count of companions' steps before such a step `iteration` (rCM's critic steps)."""
    return iteration - student_updates_before(iteration, warmup=warmup, student_update_freq=student_update_freq) - 1


def rollout_steps(k: int, *, max_steps: int = 4) -> int:
    """n = k % max_steps + 1 rollout steps, k the count of updates of that network so far."""
    return k % max_steps + 1
