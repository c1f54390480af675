"""Time distributions against their definitions; the alternation against a brute-force list."""

import math

import pytest
import torch

from rcm_megatron.diffusion import timesteps
from rcm_megatron.diffusion.noise import SeededDraws
from rcm_megatron.diffusion.trigflow import to_rf
from tests.helpers import assert_close


def test_lognormal_time():
    z = torch.tensor([-3.0, 0.0, 1.5, 4.0])
    sigma = torch.exp(1.6 * z.double() + 0.7)
    assert_close("p_G", torch.atan(sigma), timesteps.lognormal_time(z, mean=0.7, std=1.6), rel=1e-15)


def test_uniform_shift_time():
    u = torch.tensor([0.0, 0.25, 0.5, 1.0 - 2**-24])
    s = 5 * u.double() / (1 + 4 * u.double())
    t = timesteps.uniform_shift_time(u, shift=5.0)
    assert_close("s", s, to_rf(t), rel=1e-14)
    assert t.dtype == torch.float64
    assert t[0] == 0
    assert t[-1] < math.pi / 2


def test_start_time():
    assert timesteps.start_time() == torch.tensor(math.pi / 2, dtype=torch.float32).item()
    assert timesteps.start_time(80.0) == math.atan(80.0)
    with pytest.raises(ValueError, match="got sigma_max=-1"):
        timesteps.start_time(-1)


def _rollout_times(draws, **options):
    def draw(purpose):
        return timesteps.uniform_shift_time(draws.uniform(purpose))

    return timesteps.rollout_times(batch_size=draws.batch_size, draw=draw, **options)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_rollout_times_are_draws_capped_by_the_previous_time(steps):
    draws = SeededDraws(3, 5, range(64))
    times = _rollout_times(draws, steps=steps)
    assert [t.shape for t in times] == [(64,)] * steps
    for sample in range(64):
        previous = timesteps.PURE_NOISE_TIME
        for j in range(1, steps):
            u = draws.uniform(f"rollout_time/{j - 1}")[sample].double().item()
            s = 5 * u / (1 + 4 * u)
            previous = min(previous, math.atan(s / (1 - s)))
            assert times[j][sample].item() == pytest.approx(previous, rel=1e-14)


def test_fixed_rollout_times():
    draws = SeededDraws(0, 0, range(3))
    times = _rollout_times(draws, steps=3, mid_times=(1.5, 1.4, 1.0), sigma_max=80.0)
    expected = [math.atan(80.0), torch.tensor(1.5).item(), torch.tensor(1.4).item()]
    assert [t.tolist() for t in times] == [[value] * 3 for value in expected]
    with pytest.raises(ValueError, match="got steps=5"):
        _rollout_times(draws, steps=5, mid_times=(1.5, 1.4, 1.0))


def test_sampler_times():
    assert timesteps.sampler_times(steps=1) == (timesteps.PURE_NOISE_TIME,)
    assert timesteps.sampler_times(steps=4, sigma_max=80.0) == (math.atan(80.0), 1.5, 1.4, 1.0)
    with pytest.raises(ValueError, match="need 1 <= steps <= 4"):
        timesteps.sampler_times(steps=0)


def test_dcm_times():
    u = torch.tensor([0.0, 0.3, 1.0 - 2**-24])
    times = timesteps.dcm_times(u, skip=3, total_steps=48)
    assert times.shape == (4, 3)
    assert times.dtype == torch.float64
    unshifted = torch.stack([1 - u.double() * (1 - 3 / 48) - j / 48 for j in range(4)])
    assert_close("s", 5 * unshifted / (1 + 4 * unshifted), to_rf(times), rel=1e-6)
    assert bool((times[:-1] > times[1:]).all())
    assert bool((times >= 0).all())
    with pytest.raises(ValueError, match="got skip=0"):
        timesteps.dcm_times(u, skip=0, total_steps=48)


def test_dcm_times_of_one_sample_do_not_depend_on_the_batch():
    u = torch.rand(5)
    whole = timesteps.dcm_times(u, skip=2, total_steps=48)
    for b in range(5):
        assert torch.equal(whole[:, b : b + 1], timesteps.dcm_times(u[b : b + 1], skip=2, total_steps=48))


def test_tangent_warmup_ratio():
    ratios = [timesteps.tangent_warmup_ratio(i, warmup=10) for i in (0, 8, 10, 25)]
    assert ratios == [0.0, 0.8, 1.0, 1.0]
    assert timesteps.tangent_warmup_ratio(0, warmup=0) == 1.0


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("freq", [1, 2, 5])
def test_alternation_against_a_list(warmup, freq):
    """The run written out as a list of steps: counts and rollout lengths, with and without a warm-up."""
    run = ["student"] * warmup + (["student"] + ["companion"] * (freq - 1)) * 12
    settings = {"warmup": warmup, "student_update_freq": freq}
    for i, kind in enumerate(run):
        assert timesteps.is_student_step(i, **settings) == (kind == "student")
        count = timesteps.student_updates_before if kind == "student" else timesteps.companion_updates_before
        done = run[:i].count(kind)
        assert count(i, **settings) == done
        assert timesteps.rollout_steps(done) == (1, 2, 3, 4)[done % 4]
    students = [i for i, kind in enumerate(run) if kind == "student" and i >= warmup]
    lengths = [timesteps.rollout_steps(timesteps.student_updates_before(i, **settings)) for i in students]
    assert lengths == [(warmup + n) % 4 + 1 for n in range(len(students))]


def test_rollout_steps_with_another_maximum():
    assert [timesteps.rollout_steps(k, max_steps=2) for k in range(5)] == [1, 2, 1, 2, 1]


SIDES = {"high": (1.2, math.pi / 2), "low": (0.0, 1.2)}
DISTRIBUTIONS = {
    "lognormal": lambda z, u, **cut: timesteps.lognormal_time(z, mean=0.3, std=1.6, **cut),
    "shifted": lambda z, u, **cut: timesteps.uniform_shift_time(u, shift=5.0, **cut),
    "grid": lambda z, u, **cut: timesteps.dcm_times(u, skip=2, total_steps=400, shift=5.0, **cut)[0],
}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_times_of_one_side_are_those_of_the_whole_that_lie_there(name, side):
    """Against rejection: the same quantiles, inside, and rising with the draw as the whole distribution does."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(40_000, generator=generator, dtype=torch.float64).sort().values
    u = torch.rand(40_000, generator=generator, dtype=torch.float64).sort().values
    low, high = SIDES[side]
    whole = DISTRIBUTIONS[name](z, u)
    kept = whole[(whole >= low) & (whole < high)].sort().values
    times = DISTRIBUTIONS[name](z, u, within=timesteps.Within(low, high))
    assert len(kept) > 2000 and float(times.min()) >= low - 1e-6 and float(times.max()) <= high + 1e-6
    order = -1 if name == "grid" else 1
    assert bool((order * times.diff() >= -1e-6).all())
    at = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)
    assert float((times.quantile(at) - kept.quantile(at)).abs().max()) < 0.02 * (high - low)


def test_times_of_one_side_are_finite_at_extreme_draws():
    z, u = torch.tensor([-40.0, -9.0, 9.0, 40.0]), torch.tensor([0.0, 1e-12, 1 - 1e-12, 1.0])
    for low, high in SIDES.values():
        for name, draw in DISTRIBUTIONS.items():
            times = draw(z.double(), u.double(), within=timesteps.Within(low, high))
            assert bool(torch.isfinite(times).all()) and float(times.min()) >= low - 1e-6, (name, times)
            assert float(times.max()) <= high + 1e-6, (name, times)


@pytest.mark.parametrize(("boundary", "shares"), [(0.875, (0.61, 0.58)), (0.9, (0.67, 0.64))])
def test_most_training_times_lie_below_the_boundary_of_wan_2_2(boundary, shares):
    """Of p_G (lognormal 1.5, 1.6) and p_D (shift 5), text- and image-to-video: what one student begins as the wrong expert for."""
    draws = SeededDraws(0, 0, range(20_000))
    p_g = timesteps.lognormal_time(draws.normal_scalar("z"), mean=1.5, std=1.6)
    p_d = timesteps.uniform_shift_time(draws.uniform("u"), shift=5.0)
    for times, share in zip((p_g, p_d), shares, strict=True):
        assert float((to_rf(times) < boundary).double().mean()) == pytest.approx(share, abs=0.012)
