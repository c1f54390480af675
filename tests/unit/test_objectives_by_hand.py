"""Objectives through the training step, against their formulas written out on diffusers' Wan: what no golden file has.

Rollouts of four steps, DMD after a warm-up and with a weight, tangent warm-up r of 0 and 0.3 with dF as it is and scaled by r, a
sample that is not finite. The formulas are those of the papers; of this program they use the random draws and nothing else. fp32, one rank.
"""

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from rcm_megatron.config import DistillationConfig, ParallelConfig, StageConfig, TimeDistribution
from rcm_megatron.conformance.golden import load_golden
from rcm_megatron.diffusion.noise import SeededDraws
from rcm_megatron.platform.device import init_distributed
from rcm_megatron.platform.megatron import prepare_megatron
from tests.helpers import GOLDEN, assert_close
from tests.unit.test_diffusion_golden import Network

BOUND = 2e-5
"""Of losses and gradients; the golden files' own."""
MEAN, STD, SHIFT, GUIDANCE, WARMUP = 0.7, 1.6, 5.0, 3.0, 10
DISTILLATION = DistillationConfig(
    teacher_guidance=GUIDANCE,
    p_g=TimeDistribution(kind="lognormal", mean=MEAN, std=STD),
    p_d=TimeDistribution(kind="uniform_shift", shift=SHIFT),
)


@pytest.fixture(scope="module")
def golden():
    return load_golden(GOLDEN / "nvlabs_rcm_small.safetensors")


@pytest.fixture(scope="module")
def networks(golden):
    prepare_megatron()
    from megatron.core import parallel_state

    from rcm_megatron.conformance.replay import build

    init_distributed()
    yield build(golden, ParallelConfig())
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


class ByHand:
    """The formulas, in [b, c, t, h, w], on the golden file's weights and data."""

    def __init__(self, golden, *, iteration):
        self.x0, self.text, self.null = golden.x0.double(), golden.cond, golden.uncond
        self.draws = SeededDraws(11, iteration, range(len(golden.x0)))
        self.student, self.teacher, self.fake_score = (
            Network(golden.config, golden.weights[role]) for role in ("student", "teacher", "fake_score")
        )

    def noise(self, purpose):
        return self.draws.normal(purpose, tuple(self.x0.shape[1:])).double()

    def v(self, network, x, t, text):
        """Rectified flow sees x / (cos + sin) at 1000 sin / (cos + sin)."""
        scale = 1 / (t.cos() + t.sin())
        return network(scale * x, (1000 * scale * t.sin()).flatten(), text).double()

    def x0_of(self, network, x, t, text):
        return (x - t.sin() * self.v(network, x, t, text)) / (t.cos() + t.sin())

    def F_of(self, network, x, t, text):
        return ((t.cos() - t.sin()) * x + self.v(network, x, t, text)) / (t.cos() + t.sin())

    def guided(self, function, x, t):
        unconditional = function(self.teacher, x, t, self.null)
        return unconditional + GUIDANCE * (function(self.teacher, x, t, self.text) - unconditional)

    def p_d(self, purpose):
        u = column(self.draws.uniform(purpose).double())
        s = SHIFT * u / (1 + (SHIFT - 1) * u)
        return torch.atan2(s, 1 - s)

    def scm(self, r, *, scaled):
        """Losses of the samples, [b]."""
        t = torch.atan(torch.exp(STD * column(self.draws.normal_scalar("time").double()) + MEAN))
        cos, sin = t.cos(), t.sin()
        xt = cos * self.x0 + sin * self.noise("noise")
        with torch.no_grad():
            F_teacher = self.guided(self.F_of, xt, t)
            tangents = (cos * sin * F_teacher, cos * sin)
            _, dF = torch.func.jvp(lambda x, t: self.F_of(self.student, x, t, self.text), (xt, t), tangents)
        F = self.F_of(self.student, xt, t, self.text)
        with torch.no_grad():
            g = -cos * torch.sqrt(1 - r**2 * sin**2) * (F - F_teacher) - r * cos * sin * xt - (r if scaled else 1) * dF
            g /= g.flatten(1).norm(dim=1).view(-1, 1, 1, 1, 1) + 0.1
            target = F - (-g)
        return (F - target).square().flatten(1).sum(1)

    def rollout(self, steps):
        """(xt, t) of the last step."""
        t = torch.full((len(self.x0), 1, 1, 1, 1), math.pi / 2, dtype=torch.float64)
        x = self.noise("rollout_init")
        with torch.no_grad():
            for j in range(steps - 1):
                x0 = self.x0_of(self.student, x, t, self.text)
                t = torch.minimum(self.p_d(f"rollout_time/{j}"), t)
                x = t.cos() * x0 + t.sin() * self.noise(f"rollout_noise/{j}")
        return x, t

    def dmd(self, steps):
        G = self.x0_of(self.student, *self.rollout(steps), self.text)
        with torch.no_grad():
            t = self.p_d("score_time")
            xt = t.cos() * G + t.sin() * self.noise("score_noise")
            fake, teacher = self.x0_of(self.fake_score, xt, t, self.text), self.guided(self.x0_of, xt, t)
            mean = (G - teacher).abs().flatten(1).mean(1).view(-1, 1, 1, 1, 1)
            target = G - (fake - teacher) / mean
        return (G - target).square().flatten(1).sum(1)

    def fake(self, steps):
        with torch.no_grad():
            G = self.x0_of(self.student, *self.rollout(steps), self.text)
        t = self.p_d("score_time")
        xt = t.cos() * G + t.sin() * self.noise("score_noise")
        return ((G - self.x0_of(self.fake_score, xt, t, self.text)) / t.sin()).square().flatten(1).sum(1)


def column(value_B):
    return value_B.view(-1, 1, 1, 1, 1)


def samples_of(golden, networks, *, iteration):
    from rcm_megatron.objectives.samples import Samples

    text, null = (part.transpose(0, 1).contiguous() for part in (golden.cond, golden.uncond))
    draws = SeededDraws(11, iteration, range(len(golden.x0)))
    return Samples(networks.layout.shard(golden.x0), text, null, draws, micro_batch_size=1)


def trained(networks, samples, stage, iteration, objectives=None):
    """(step, results, {parameter in diffusers' naming: gradient of the summed loss}) of an iteration of a stage."""
    from rcm_megatron.checkpoint.models import gather_full
    from rcm_megatron.checkpoint.translate import from_internal
    from rcm_megatron.objectives.plan import plan_step
    from rcm_megatron.parallel.pipeline import reduce_gradients
    from rcm_megatron.training.optimizer import gather_main_grads
    from rcm_megatron.training.step import accumulate_step

    step = plan_step(stage, iteration, max_rollout_steps=DISTILLATION.max_rollout_steps)
    chunks, groups = networks[step.trained], networks.layout.groups
    for chunk in chunks:
        chunk.zero_grad_buffer()
    settings = {"stage": stage, "distillation": DISTILLATION, "objectives": objectives or {}}
    results = accumulate_step(step, networks, samples, **settings)
    reduce_gradients(chunks)
    gradients = gather_main_grads(chunks)
    whole = dict(gather_full(chunks, tp_group=groups.tp, pp_group=groups.pp, getter=gradients.__getitem__))
    theirs = from_internal(whole, chunks[0].module.model, "diffusers", partial=True)
    return step, results, {name: samples.count * gradient for name, gradient in theirs}


def assert_gradients(network, gradients):
    expected = {name: p.grad for name, p in network.model.named_parameters() if p.grad is not None}
    assert expected.keys() == gradients.keys()
    floor = 1e-6 * torch.stack([g.double().norm() for g in expected.values()]).norm()
    for name, gradient in expected.items():
        error = (gradients[name].reshape(gradient.shape).double() - gradient.double()).norm()
        assert error <= BOUND * max(gradient.double().norm(), floor), name


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("iteration", [0, 3])
def test_scm_in_its_warmup(golden, networks, iteration, scaled):
    """r = 0 and 0.3."""
    from rcm_megatron.objectives.scm import ScmSettings

    stage = StageConfig(name="scm", steps=20, losses={"scm": 40.0}, tangent_warmup=WARMUP)
    samples = samples_of(golden, networks, iteration=iteration)
    settings = {"scm": ScmSettings(scale_jvp_by_warmup=scaled)}
    step, results, gradients = trained(networks, samples, stage, iteration, settings)
    hand = ByHand(golden, iteration=iteration)
    loss_B = hand.scm(iteration / WARMUP, scaled=scaled)
    (40.0 * loss_B).sum().backward()
    assert step.warmup_ratio == iteration / WARMUP
    assert_close("loss", loss_B.detach(), results["scm"].loss_B, rel=1e-7)
    assert_gradients(hand.student, gradients)


@pytest.mark.parametrize(("iteration", "warmup", "role", "steps"), [(3, 3, "student", 4), (10, 3, "fake_score", 4)])
def test_rollouts_of_four_steps_after_a_warmup(golden, networks, iteration, warmup, role, steps):
    """DMD alone among the losses that count (scm's weight is nearly nothing), of weight 0.3; its fake score in its own iteration."""
    losses = {"scm": 1e-12, "dmd": 0.3}
    stage = StageConfig(name="rcm", steps=20, losses=losses, tangent_warmup=warmup, student_update_freq=2)
    samples = samples_of(golden, networks, iteration=iteration)
    step, results, gradients = trained(networks, samples, stage, iteration)
    assert (step.trained, step.rollout_steps) == (role, steps)
    hand = ByHand(golden, iteration=iteration)
    loss_B = hand.dmd(steps) if role == "student" else hand.fake(steps)
    weight, name = (0.3, "dmd") if role == "student" else (1.0, "fake_score")
    (weight * loss_B).sum().backward()
    assert_close("loss", loss_B.detach(), results[name].loss_B, rel=2e-5)
    assert_gradients(getattr(hand, role), gradients)


def test_a_sample_whose_F_is_not_finite_counts_nothing_and_hides_no_other(golden, networks):
    """Data of 1e38 in one sample overflow in the networks; the student sees zeros in its place, so its gradients stay finite."""
    stage = StageConfig(name="scm", steps=20, losses={"scm": 100.0})
    clean = samples_of(golden, networks, iteration=0)
    bad = replace(clean, x0_SBP=clean.x0_SBP.clone())
    bad.x0_SBP[:, 1] = 1e38
    _, expected, _ = trained(networks, clean, stage, 0)
    _, got, _ = trained(networks, bad, stage, 0)
    is_bad = torch.arange(clean.count) == 1
    assert torch.equal(got["scm"].nan_B, is_bad) and not expected["scm"].nan_B.any()
    for name, value_B in {"loss": got["scm"].loss_B, **got["scm"].quantities}.items():
        assert float(value_B[1]) == 0, name
        want_B = expected["scm"].loss_B if name == "loss" else expected["scm"].quantities[name]
        assert_close(name, want_B[~is_bad], value_B[~is_bad], rel=1e-6)
