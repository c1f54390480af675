"""Samplers on Gaussian data N(m, c^2), where the consistency function and the ODE have closed solutions."""

import math
from itertools import pairwise

import pytest
import torch

from rcm_megatron.diffusion import losses, samplers, timesteps, trigflow
from rcm_megatron.diffusion.noise import SeededDraws
from tests.helpers import assert_close

MEAN, STD = 0.8, 0.3


def consistency(xt, t):
    """The end at t = 0 of the ODE through (xt, t): m + c (xt - cos m) / sqrt(c^2 cos^2 + sin^2)."""
    c, s = torch.cos(t), torch.sin(t)
    return MEAN + STD * (xt - c * MEAN) / torch.sqrt((STD * c) ** 2 + s**2)


def gaussian_velocity(x, s):
    """E[noise - x0 | x_s = x] of rectified flow; the exact solution from noise at s = 1 is m + c noise."""
    variance = (1 - s) ** 2 * STD**2 + s**2
    return -MEAN + (s - (1 - s) * STD**2) / variance * (x - (1 - s) * MEAN)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("sigma_max", [None, 80.0])
def test_student_with_the_exact_consistency_function_draws_the_data(steps, sigma_max):
    draws = SeededDraws(0, 0, range(4))
    shape = (50, 100)
    noise = draws.normal("rollout_init", shape)
    x0 = samplers.student_sample(
        consistency,
        noise,
        steps=steps,
        fresh_noise=lambda j: draws.normal(f"rollout_noise/{j}", shape),
        sigma_max=sigma_max,
    )
    assert x0.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert x0.std().item() == pytest.approx(STD, abs=0.02)
    if steps == 1 and sigma_max is None:
        assert_close("one step", MEAN + STD * noise.double(), x0, rel=1e-6)


@pytest.mark.parametrize(("steps", "sigma_max"), [(1, 3.0), (4, 80.0)])
def test_student_steps_are_those_of_rectified_flow(steps, sigma_max):
    """NVlabs' form: x = s noise, then x = (1 - s') x0 + s' fresh noise at each step, with x the network's input."""
    draws = SeededDraws(4, 0, range(2))
    noise, fresh = draws.normal("a", (3, 5)), [draws.normal(f"b{j}", (3, 5)).double() for j in range(3)]

    def network(x, s):
        return torch.tanh(x) * s - 0.3 * x

    def denoise(xt, t):
        x_in, timestep = trigflow.precondition(xt, t)
        return trigflow.denoised(xt, network(x_in, timestep.double() / 1000), t)

    times = torch.tensor([math.atan(sigma_max), 1.5, 1.4, 1.0], dtype=torch.float64)
    s = torch.sin(times) / (torch.cos(times) + torch.sin(times))
    x = s[0] * noise.double()
    for j in range(steps):
        x = x - s[j] * network(x, s[j])
        if j < steps - 1:
            x = (1 - s[j + 1]) * x + s[j + 1] * fresh[j]
    actual = samplers.student_sample(denoise, noise, steps=steps, fresh_noise=fresh.__getitem__, sigma_max=sigma_max)
    assert_close("x0", x, actual, rel=1e-6)


def test_four_step_rollout_written_out():
    """n = 4 with times of its own for each sample; in token layout; only the last step is left to the caller."""
    draws = SeededDraws(9, 0, range(3))
    drawn = timesteps.rollout_times(
        batch_size=3, steps=4, draw=lambda p: timesteps.uniform_shift_time(draws.uniform(p))
    )
    times = [t.view(1, 3, 1) for t in drawn]
    noise = draws.normal("rollout_init", (5, 7)).transpose(0, 1)
    fresh = [draws.normal(f"rollout_noise/{j}", (5, 7)).transpose(0, 1) for j in range(3)]
    calls = []

    def denoise(xt, t):
        calls.append(t)
        return 0.5 * xt * torch.cos(t) + 0.1

    xt, t = samplers.rollout(denoise, noise, times=times, fresh_noise=fresh.__getitem__)
    x = noise.double()
    for j in range(3):
        x0 = 0.5 * x * torch.cos(times[j]) + 0.1
        x = torch.cos(times[j + 1]) * x0 + torch.sin(times[j + 1]) * fresh[j].double()
    assert_close("xt", x, xt, rel=1e-14)
    assert t is times[3]
    assert [call is time for call, time in zip(calls, times[:3], strict=True)] == [True] * 3


def test_one_step_rollout_is_the_noise_itself():
    noise, t = torch.randn(2, 3), torch.ones(2, 1)
    xt, last = samplers.rollout(None, noise, times=[t], fresh_noise=None)
    assert xt is noise
    assert last is t


def error(sampler, steps, **settings):
    noise = torch.randn(6, 2, 4, generator=torch.Generator().manual_seed(2))
    exact = MEAN + STD * noise.double()
    x = sampler(gaussian_velocity, noise, steps=steps, **settings)
    assert x.dtype == torch.float64
    return ((x - exact).norm() / exact.norm()).item()


def test_euler_converges_at_first_order():
    errors = [error(samplers.euler_sample, steps) for steps in (20, 40, 80, 160)]
    for coarse, fine in pairwise(errors):
        assert 1.7 < coarse / fine < 2.3
    assert errors[-1] < 0.02


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_unipc_converges_and_beats_euler(shift):
    """Of second order, but its jump from the last time to 0 is of first order and dominates with few steps.

    400 steps also repeat integer timesteps near s = 1: no step may be looked up by its timestep.
    """
    unipc = {steps: error(samplers.unipc_sample, steps, shift=shift) for steps in (20, 40, 80, 400)}
    assert unipc[20] < 0.9 * error(samplers.euler_sample, 20, shift=shift)
    assert unipc[80] < 0.1 * error(samplers.euler_sample, 80, shift=shift)
    assert unipc[400] < 0.1 * unipc[40]


def test_teacher_times():
    times = samplers.teacher_rf_times(steps=4, shift=5.0)
    u = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0], dtype=torch.float64)
    assert_close("s", 5 * u / (1 + 4 * u), times, rel=1e-15)
    clipped = samplers.teacher_rf_times(steps=4, shift=5.0, sigma_max=5000.0)
    assert clipped[0].item() == pytest.approx(5000 / 5001, rel=1e-14)
    assert clipped[-1] == 0
    with pytest.raises(ValueError, match="got steps=0"):
        samplers.teacher_rf_times(steps=0)


def test_samplers_see_the_same_times():
    seen = {}
    for sampler in (samplers.euler_sample, samplers.unipc_sample):
        calls = seen[sampler] = []
        sampler(lambda x, s, calls=calls: calls.append(s) or 0 * x, torch.randn(2, 3), steps=7)
    euler, unipc = (torch.tensor(calls, dtype=torch.float64) for calls in seen.values())
    assert len(euler) == len(unipc) == 7
    assert_close("times", euler, unipc, rel=2e-6)


def test_batch_sum_keeps_the_batch():
    assert losses.batch_sum(1)(torch.ones(4, 3, 2)).tolist() == [[[8.0], [8.0], [8.0]]]
