"""Two-time maps: tangents against torch.func.jvp in fp64, the exact map of Gaussian data, and FastGen's finite difference.

Gaussian data of standard deviation c have x_t = cos t x0 + sin t noise with variance a(t)^2 = cos^2 t c^2 + sin^2 t; the probability flow
scales them: f(x, t, s) = a(s)/a(t) x, and the velocity is a'(t)/a(t) x.
"""

import math

import pytest
import torch

from rcm_megatron.diffusion import flow_maps, losses, samplers, trigflow
from tests.helpers import assert_close, relative_error

C = 0.37


def a(t):
    return (t.cos().square() * C**2 + t.sin().square()).sqrt()


def exact_velocity(x, t):
    return (1 - C**2) * t.sin() * t.cos() / a(t) ** 2 * x


def exact_F(x, t, s):
    """F of the exact map, cos d x - sin d F = a(s)/a(t) x; at s = t its limit."""
    d = t - s
    ratio = a(s) / a(t)
    return (
        torch.where(d > 0, (d.cos() - ratio) / d.sin().where(d > 0, 1.0), (1 - C**2) * t.sin() * t.cos() / a(t) ** 2)
        * x
    )


def some_F(x, t, s):
    """A smooth function of everything, no map."""
    return torch.tanh(x * (1 + s) + t) + 0.3 * x.roll(1, -1) * (2 * s - t).sin()


def some_teacher(x, t):
    return (x + t).sin() - 0.2 * x.roll(1, -1)


@pytest.fixture
def drawn():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 12, generator=generator, dtype=torch.float64)
    t = 1.5 * torch.rand(64, 1, generator=generator, dtype=torch.float64) + 0.05
    s = t * torch.rand(64, 1, generator=generator, dtype=torch.float64)
    s[:5], s[5:10] = 0.0, t[5:10]
    return x, t, s


def jvp_of(F, x, t, s, tangents):
    return torch.func.jvp(F, (x, t, s), tangents)[1]


def test_eulerian_tangent_is_the_maps_derivative(drawn):
    """cos d df/dt at fixed s along the teacher, by the seeds of sCM with d in the place of t; and MeanFlow's, of one direction."""
    x, t, s = drawn
    teacher, d = some_teacher(x, t), t - s

    def f(x, t, s):
        return flow_maps.flow_map(x, some_F(x, t, s), t, s)

    df_dt = jvp_of(f, x, t, s, (teacher, torch.ones_like(t), torch.zeros_like(s)))
    t_x, t_t = losses.tangent_seed(teacher, d)
    dF = jvp_of(some_F, x, t, s, (t_x, t_t, torch.zeros_like(s)))
    g = losses.scm_tangent(some_F(x, t, s), teacher, dF, x, d, warmup_ratio=1.0)
    assert_close("g", d.cos() * df_dt, g, rel=1e-12)
    m = t.cos() + t.sin()
    t_x, t_t = flow_maps.average_velocity_seed(teacher, t, s)
    dF = jvp_of(some_F, x, t, s, (t_x, t_t, torch.zeros_like(s)))
    h = flow_maps.average_velocity_tangent(some_F(x, t, s), teacher, dF, x, t, s, warmup_ratio=1.0)
    assert_close("h", m**2 / (s.cos() + s.sin()) * df_dt, h, rel=1e-12)
    equal = slice(5, 10)
    assert_close("at s = t", (teacher - some_F(x, t, s))[equal], g[equal], rel=1e-12)


def test_average_velocity_is_the_map_in_rectified_flow(drawn):
    """f/m(s) = x/m(t) - (sigma_t - sigma_s) u of the network's output, whatever s is; the interval is that difference."""
    x, t, s = drawn
    u = some_F(x, s, t)
    mapped = flow_maps.flow_map(x, trigflow.velocity(x, u, t), t, s)
    x_in, _ = trigflow.precondition(x, t)
    interval = trigflow.to_rf(t) - trigflow.to_rf(s)
    assert_close("map", x_in - interval * u, mapped / (s.cos() + s.sin()), rel=1e-12)
    assert_close("interval", 1000 * interval, flow_maps.interval(t, s), rel=1e-6)
    assert not flow_maps.interval(t, t).any()
    seeds = torch.randn(2, *t.shape, dtype=torch.float64)
    expected = torch.func.jvp(lambda t, s: 1000 * (trigflow.to_rf(t) - trigflow.to_rf(s)), (t, s), tuple(seeds))[1]
    assert_close("its tangent", expected, flow_maps.interval_jvp(t, s, *seeds)[1], rel=1e-6)


def test_mean_flow_identity(drawn):
    """h is MeanFlow's v - (sigma_t - sigma_s) du/dsigma - u, with the derivative scaled by the warm-up."""
    x, t, s = drawn
    sigma_t, sigma_s = trigflow.to_rf(t), trigflow.to_rf(s)

    def u_of(x_in, sigma, other):
        return (x_in + sigma).tanh() - other * x_in

    v = some_teacher(x, t)
    x_in = trigflow.precondition(x, t)[0]
    du = jvp_of(u_of, x_in, sigma_t, sigma_s, (v, torch.ones_like(t), torch.zeros_like(s)))
    u = u_of(x_in, sigma_t, sigma_s)

    def F_of(x, t, s):
        x_in = x / (t.cos() + t.sin())
        return trigflow.velocity(x, u_of(x_in, trigflow.to_rf(t), trigflow.to_rf(s)), t)

    F_teacher = trigflow.velocity(x, v, t)
    seeds = flow_maps.average_velocity_seed(F_teacher, t, s)
    dF = jvp_of(F_of, x, t, s, (*seeds, torch.zeros_like(s)))
    for r in (0.0, 0.3, 1.0):
        h = flow_maps.average_velocity_tangent(F_of(x, t, s), F_teacher, dF, x, t, s, warmup_ratio=r)
        assert_close(f"h at r = {r}", v - u - r * (sigma_t - sigma_s) * du, h, rel=1e-11)


def test_lagrangian_tangent_is_the_maps_derivative(drawn):
    x, t, s = drawn
    d = t - s

    def f(x, t, s):
        return flow_maps.flow_map(x, some_F(x, t, s), t, s)

    still = (torch.zeros_like(x), torch.zeros_like(t))
    df_ds = jvp_of(f, x, t, s, (*still, torch.ones_like(s)))
    dF = jvp_of(some_F, x, t, s, (*still, d.sin()))
    F_teacher = some_teacher(f(x, t, s), s)
    g = flow_maps.lagrangian_tangent(some_F(x, t, s), F_teacher, dF, x, t, s, warmup_ratio=1.0)
    assert_close("g", F_teacher - df_ds, g, rel=1e-12)


def test_both_tangents_vanish_at_the_exact_map_of_gaussian_data(drawn):
    x, t, s = drawn
    d, F = t - s, exact_F(x, t, s)
    assert_close("the map", a(s) / a(t) * x, flow_maps.flow_map(x, F, t, s), rel=1e-12)
    different = (d > 0).expand_as(x)  # where s = t the formula of exact_F is 0/0, and so is its derivative
    t_x, t_t = losses.tangent_seed(exact_velocity(x, t), d)
    dF = jvp_of(exact_F, x, t, s, (t_x, t_t, torch.zeros_like(s)))
    g = losses.scm_tangent(F, exact_velocity(x, t), dF, x, d, warmup_ratio=1.0)
    assert float(g[different].norm()) < 1e-11 * float(F.norm())
    mapped = flow_maps.flow_map(x, F, t, s)
    dF = jvp_of(exact_F, x, t, s, (torch.zeros_like(x), torch.zeros_like(t), d.sin()))
    g = flow_maps.lagrangian_tangent(F, exact_velocity(mapped, s), dF, x, t, s, warmup_ratio=1.0)
    assert float(g[different].norm()) < 1e-11 * float(F.norm())


@pytest.mark.parametrize(("t", "s"), [(1.2, 0.5), (0.7, 0.0), (1.45, 1.3)])
def test_mean_flow_from_data_vanishes_in_expectation_given_x(t, s):
    """Many (x0, noise) of one noise level: g, regressed on x, has no slope at the exact map, and has one at another."""
    generator = torch.Generator().manual_seed(2)
    x0, noise = torch.randn(2, 400_000, generator=generator, dtype=torch.float64)
    x0 = C * x0
    t, s = (torch.full_like(x0, time) for time in (t, s))
    x, velocity = trigflow.add_noise(x0, noise, t), flow_maps.data_velocity(x0, noise, t)
    assert_close("velocity", trigflow.velocity(x, noise - x0, t), velocity, rel=1e-12)
    slopes = {}
    for name, off in (("exact", 0.0), ("other", 0.1)):

        def F_of(x, t, s, off=off):
            return exact_F(x, t, s) + off * x

        t_x, t_t = flow_maps.average_velocity_seed(velocity, t, s)
        dF = jvp_of(F_of, x, t, s, (t_x, t_t, 0 * x))
        h = flow_maps.average_velocity_tangent(F_of(x, t, s), velocity, dF, x, t, s, warmup_ratio=1.0)
        slopes[name] = float((h * x).mean() / x.square().mean())
        error = float((h * x).std() / x.square().mean() / math.sqrt(len(x)))
    assert abs(slopes["exact"]) < 4 * error < 0.02 and abs(slopes["other"]) > 5 * error, (slopes, error)


def fastgen_target(u_of, x, v, t, r, *, epsilon):
    """NVlabs/FastGen's mean_flow.py with use_jvp off, from its formula: u moves along (v, 1, 0), a central difference, in rectified flow.

    u_target = v - (t - r) du/dt."""
    ahead, behind = u_of(x + epsilon * v, t + epsilon, r), u_of(x - epsilon * v, t - epsilon, r)
    return v - (t - r) * (ahead - behind) / (2 * epsilon)


def test_direction_equals_fastgens_finite_difference(drawn):
    x, t, s = (value[10:] for value in drawn)
    sigma_t, sigma_s = trigflow.to_rf(t), trigflow.to_rf(s)
    weight = torch.randn(12, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64) / 12**0.5

    def u_of(x_in, sigma, other):
        return (x_in @ weight + sigma).tanh() - 0.4 * other * x_in

    def F_of(x, t, s):
        return trigflow.velocity(x, u_of(x / (t.cos() + t.sin()), trigflow.to_rf(t), trigflow.to_rf(s)), t)

    x_in, v = trigflow.precondition(x, t)[0], some_teacher(x, t)
    theirs = fastgen_target(u_of, x_in, v, sigma_t, sigma_s, epsilon=1e-5) - u_of(x_in, sigma_t, sigma_s)
    F_teacher = trigflow.velocity(x, v, t)
    seeds = flow_maps.average_velocity_seed(F_teacher, t, s)
    dF = jvp_of(F_of, x, t, s, (*seeds, torch.zeros_like(s)))
    h = flow_maps.average_velocity_tangent(F_of(x, t, s), F_teacher, dF, x, t, s, warmup_ratio=1.0)
    assert_close("h", theirs, h, rel=1e-7)
    seeds = losses.tangent_seed(F_teacher, t - s)
    dF = jvp_of(F_of, x, t, s, (*seeds, torch.zeros_like(s)))
    g = losses.scm_tangent(F_of(x, t, s), F_teacher, dF, x, t - s, warmup_ratio=1.0)
    cosine = torch.nn.functional.cosine_similarity(theirs, g, dim=-1)
    assert float((1 - cosine).max()) < 1e-9


def test_scales():
    norm = torch.tensor([0.0, 0.4, 3.0], dtype=torch.float64)
    scale, weight = flow_maps.norm_scale(norm, offset=0.1)
    assert_close("norm", torch.tensor([10.0, 2.0, 1 / 3.1]).double(), scale, rel=1e-6)
    assert torch.equal(weight, torch.ones(3).double())
    scale, weight = flow_maps.adaptive_scale(norm, offset=0.01, power=1.0)
    assert torch.equal(scale, torch.ones(3).double())
    assert_close("adaptive", 1 / (norm**2 + 0.01), weight, rel=1e-12)


def test_deterministic_sampling_of_the_exact_map_is_exact_in_any_number_of_steps():
    noise = torch.randn(1000, generator=torch.Generator().manual_seed(4), dtype=torch.float64)

    def exact(x, t, s):
        return flow_maps.flow_map(x, exact_F(x, t, s), t, s)

    for steps in (1, 3, 17):
        assert_close(f"{steps} steps", C * noise, samplers.flow_map_sample(exact, noise, steps=steps), rel=1e-10)
    start = torch.tensor(math.atan(80.0)).double()
    expected = a(torch.zeros(()).double()) / a(start) * start.sin() * noise
    found = samplers.flow_map_sample(exact, noise, steps=5, sigma_max=80.0)
    assert relative_error(expected, found) < 1e-9
