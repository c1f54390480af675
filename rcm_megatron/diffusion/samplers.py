"""Samplers: the student's few steps, the teacher's Euler and UniPC. Any layout; noise comes in as tensors.

`denoise(xt, t) -> x0` works in TrigFlow. `velocity(x, s) -> v` works in rectified flow: s is a float in [0, 1], the
network sees x as it is and the timestep 1000 s in fp32, and guidance is the caller's. Samples are fp64 inside.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from rcm_megatron.diffusion.timesteps import STUDENT_MID_TIMES, sampler_times, shift_rf
from rcm_megatron.diffusion.trigflow import add_noise, to_trigflow

Denoise = Callable[[Tensor, Tensor], Tensor]
Velocity = Callable[[Tensor, float], Tensor]
FlowMap = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(xt, t, s) -> xs."""


def rollout(
    denoise: Denoise, xt: Tensor, *, times: Sequence[Tensor], fresh_noise: Callable[[int], Tensor]
) -> tuple[Tensor, Tensor]:
    """All but the last step of a rollout: (xt, t) at which the last step denoises. rCM Algorithm 1.

    `times` are broadcastable TrigFlow times, one a step; `fresh_noise(j)` is the noise after step j (0 ... n-2). The
    caller does the last step itself, with gradient where it needs one.
    """
    for j, (t, t_next) in enumerate(pairwise(times)):
        xt = add_noise(denoise(xt, t), fresh_noise(j), t_next)
    return xt, times[-1]


def follow(flow_map: FlowMap, xt: Tensor, *, times: Sequence[Tensor]) -> Tensor:
    """The sample at the last of ``times``, from that at the first, by a map of two times from each to the next; no noise is added."""
    for t, s in pairwise(times):
        xt = flow_map(xt, t, s)
    return xt


@torch.no_grad()
def flow_map_sample(
    flow_map: FlowMap, noise: Tensor, *, steps: int, shift: float = 5.0, sigma_max: float | None = None
) -> Tensor:
    """Samples x0 of a flow map in any number of steps, fp64: deterministic, on the times of `euler_sample`.

    Starts at t = pi/2, or at atan(sigma_max), with sin(t) noise. Times go to ``flow_map`` as 0-dimensional fp64 tensors.
    """
    times = to_trigflow(teacher_rf_times(steps=steps, shift=shift, sigma_max=sigma_max)).to(noise.device)
    return follow(flow_map, torch.sin(times[0]) * noise.double(), times=list(times)).double()


@torch.no_grad()
def student_sample(
    denoise: Denoise,
    noise: Tensor,
    *,
    steps: int,
    fresh_noise: Callable[[int], Tensor],
    mid_times: Sequence[float] = STUDENT_MID_TIMES,
    sigma_max: float | None = None,
) -> Tensor:
    """n-step samples x0 of the student, fp64, in the layout of `noise`.

    Starts at t = pi/2, or at atan(sigma_max) as NVlabs/rcm does (see timesteps.py), with sin(t) noise; denoises and
    re-noises to each mid time. `t` goes to `denoise` as a 0-dimensional fp64 tensor.
    """
    times = [
        torch.tensor(t, dtype=torch.float64, device=noise.device)
        for t in sampler_times(steps=steps, mid_times=mid_times, sigma_max=sigma_max)
    ]
    xt, t = rollout(denoise, torch.sin(times[0]) * noise.double(), times=times, fresh_noise=fresh_noise)
    return denoise(xt, t).double()


def teacher_rf_times(*, steps: int, shift: float = 5.0, sigma_max: float | None = None) -> Tensor:
    """Rectified-flow times of a teacher sampler, fp64 `[steps + 1]`, from 1 (or sigma_max/(1 + sigma_max)) to 0."""
    return shift_rf(_unshifted_rf_times(steps=steps, shift=shift, sigma_max=sigma_max), shift=shift)


def _unshifted_rf_times(*, steps: int, shift: float, sigma_max: float | None) -> Tensor:
    if steps < 1:
        raise ValueError(f"got steps={steps}, need at least 1")
    first = 1.0
    if sigma_max is not None:
        s = sigma_max / (1 + sigma_max)
        first = s / (shift - (shift - 1) * s)
    return torch.linspace(first, 0.0, steps + 1, dtype=torch.float64)


@torch.no_grad()
def euler_sample(
    velocity: Velocity, noise: Tensor, *, steps: int, shift: float = 5.0, sigma_max: float | None = None
) -> Tensor:
    """Euler's method on the rectified-flow ODE dx/ds = v from noise to data, fp64."""
    times = teacher_rf_times(steps=steps, shift=shift, sigma_max=sigma_max).tolist()
    x = noise.double()
    for s, s_next in pairwise(times):
        x = x + (s_next - s) * velocity(x, s).double()
    return x


@torch.no_grad()
def unipc_sample(
    velocity: Velocity, noise: Tensor, *, steps: int, shift: float = 5.0, sigma_max: float | None = None
) -> Tensor:
    """UniPC (arXiv 2302.04867) of order 2 by diffusers, on the times of `euler_sample`, fp64.

    The network is asked at the scheduler's exact sigmas: its `timesteps` are rounded to integers.
    """
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    grid = _unshifted_rf_times(steps=steps, shift=shift, sigma_max=sigma_max)
    scheduler.set_timesteps(sigmas=grid[:-1].numpy(), device=noise.device)
    scheduler.set_begin_index(0)  # integer timesteps may repeat: never look a step up by its timestep
    x = noise.double()
    for s, timestep in zip(scheduler.sigmas.tolist(), scheduler.timesteps, strict=False):
        x = scheduler.step(velocity(x, s).double(), timestep, x, return_dict=False)[0]
    return x
