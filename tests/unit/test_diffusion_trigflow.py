"""The TrigFlow wrapper against torch.func.jvp, its inverses and the rectified-flow definitions."""

import math
from itertools import pairwise

import pytest
import torch

from rcm_megatron.diffusion import trigflow
from tests.helpers import assert_close

LAYOUTS = {"video": ((3, 2, 3, 5, 1), (3, 1, 1, 1, 1)), "tokens": ((7, 3, 5), (1, 3, 1))}


@pytest.fixture(params=LAYOUTS)
def layout(request):
    data, time = LAYOUTS[request.param]
    generator = torch.Generator().manual_seed(1)

    def randn():
        return torch.randn(data, generator=generator, dtype=torch.float64)

    t = torch.tensor([0.02, 0.7, 1.55], dtype=torch.float64).view(time)
    t_t = torch.tensor([0.3, -1.2, 0.8], dtype=torch.float64).view(time)
    return randn, t, t_t


def test_precondition_jvp(layout):
    randn, t, t_t = layout
    xt, t_xt = randn(), randn()

    def composed(xt, t):
        denominator = torch.cos(t) + torch.sin(t)
        return xt / denominator, 1000 * torch.sin(t) / denominator

    (x, timestep), (t_x, t_timestep) = torch.func.jvp(composed, (xt, t), (t_xt, t_t))
    actual = trigflow.precondition_jvp(xt, t, t_xt, t_t)
    assert_close("x_in", x, actual[0], rel=1e-14)
    assert_close("timestep", timestep, actual[1], rel=1e-7)
    assert_close("t_x_in", t_x, actual[2], rel=1e-14)
    assert_close("t_timestep", t_timestep, actual[3], rel=1e-7)
    for name, ours, twin in zip(("x_in", "timestep"), actual, trigflow.precondition(xt, t), strict=False):
        assert_close(name, twin, ours, rel=0)
    assert actual[0].dtype == torch.float64
    assert actual[1].dtype == actual[3].dtype == torch.float32
    assert actual[1].shape == actual[3].shape == t.shape


def test_velocity_jvp_is_that_of_the_x0_form(layout):
    """F = (cos xt - x0) / sin with x0 = c_skip xt + c_out v, as the papers write it."""
    randn, t, t_t = layout
    xt, v, t_xt, t_v = randn(), randn(), randn(), randn()

    def composed(xt, v, t):
        x0 = (xt - torch.sin(t) * v) / (torch.cos(t) + torch.sin(t))
        return (torch.cos(t) * xt - x0) / torch.sin(t)

    F, t_F = torch.func.jvp(composed, (xt, v, t), (t_xt, t_v, t_t))
    actual, t_actual = trigflow.velocity_jvp(xt, v, t, t_xt, t_v, t_t)
    assert_close("F", F, actual, rel=1e-13)
    assert_close("tangent_F", t_F, t_actual, rel=1e-11)
    assert_close("velocity", actual, trigflow.velocity(xt, v, t), rel=0)


def test_velocity_at_time_zero_is_finite():
    xt, v = torch.randn(2, 5), torch.randn(2, 5)
    assert_close("F at t = 0", xt + v, trigflow.velocity(xt, v, torch.zeros(2, 1)), rel=1e-7)


def test_x0_and_velocity_are_inverse(layout):
    """sCM Eq. 5: f(xt, t) = cos(t) xt - sin(t) F."""
    randn, t, _ = layout
    xt, v = randn(), randn()
    F, x0 = trigflow.velocity(xt, v, t), trigflow.denoised(xt, v, t)
    assert_close("x0", x0, t.cos() * xt - t.sin() * F, rel=1e-13)
    assert_close("F", F, (t.cos() * xt - x0) / t.sin(), rel=1e-11)


def test_network_sees_rectified_flow(layout):
    """A perfect v = noise - x0 gives back x0 and F = cos noise - sin x0; x_in is the rectified-flow interpolation."""
    randn, t, _ = layout
    x0, noise = randn(), randn()
    s = trigflow.to_rf(t)
    xt = trigflow.add_noise(x0, noise, t)
    x_in, timestep = trigflow.precondition(xt, t)
    assert_close("x_in", (1 - s) * x0 + s * noise, x_in, rel=1e-14)
    assert_close("timestep", 1000 * s, timestep, rel=1e-7)
    assert_close("x0", x0, trigflow.denoised(xt, noise - x0, t), rel=1e-13)
    assert_close("F", t.cos() * noise - t.sin() * x0, trigflow.velocity(xt, noise - x0, t), rel=1e-13)
    assert_close("t", t, trigflow.to_trigflow(s), rel=1e-14)


def test_time_conversion_reaches_both_ends():
    s = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    expected = torch.tensor([0.0, math.pi / 4, math.pi / 2], dtype=torch.float64)
    assert_close("t", expected, trigflow.to_trigflow(s), rel=1e-15)
    assert trigflow.to_trigflow(s.float()).dtype == torch.float32


def test_bf16_inputs_are_promoted(layout):
    randn, t, t_t = layout
    xt, v = randn().bfloat16(), randn().bfloat16()
    for out in (*trigflow.velocity_jvp(xt, v, t, xt, v, t_t), trigflow.denoised(xt, v, t)):
        assert out.dtype == torch.float64
    assert_close("F", trigflow.velocity(xt.double(), v.double(), t), trigflow.velocity(xt, v, t), rel=0)


def test_velocity_carries_gradient(layout):
    randn, t, _ = layout
    xt, v = randn(), randn().float().requires_grad_()
    trigflow.velocity(xt, v, t).sum().backward()
    assert_close("dF/dv", (1 / (t.cos() + t.sin())).expand_as(v), v.grad, rel=1e-6)


def test_guidance():
    conditional, unconditional = torch.tensor([2.0]), torch.tensor([1.0])
    assert trigflow.guided(conditional, unconditional, scale=5.0).item() == 6.0
    assert [trigflow.needs_guidance(scale) for scale in (0.0, 1.0, 1.01, 5.0)] == [False, False, True, True]


def test_euler_step_follows_the_flow():
    """dx/dt = F holds for F = cos noise - sin x0: small steps from noise arrive at x0."""
    x0, noise = torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    times = torch.linspace(math.pi / 2, 0, 2001, dtype=torch.float64)
    x = noise
    for t, t_next in pairwise(times):
        x = trigflow.euler_step(x, t.cos() * noise - t.sin() * x0, t, t_next)
    assert_close("x0", x0, x, rel=2e-3)
