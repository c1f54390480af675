"""Replays every case of the golden files: the pure functions of diffusion/ around diffusers' Wan network, in fp32.

Layout [b, c, t, h, w]. The golden files are in tests/golden.
"""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from rcm_megatron.conformance.golden import BOUNDS, ReplayDraws, load_golden, relative_error
from rcm_megatron.diffusion import losses, samplers, timesteps, trigflow
from tests.helpers import GOLDEN

FILES = ("nvlabs_rcm_small.safetensors", "nvlabs_rcm_deep.safetensors")
CASES = sorted(BOUNDS)
BATCH_SUM = losses.batch_sum(0)


class Fp64Sinusoid(torch.nn.Module):
    """diffusers' timestep embedding [cos, sin], computed in fp64 and rounded once."""

    def __init__(self, dim):
        super().__init__()
        self.dim = dim

    def forward(self, timestep):
        half = self.dim // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float64) / half)
        angles = timestep.double()[:, None] * frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=-1).float()


RENAMES = (
    ("text_embedding.0.", "condition_embedder.text_embedder.linear_1."),
    ("text_embedding.2.", "condition_embedder.text_embedder.linear_2."),
    ("time_embedding.0.", "condition_embedder.time_embedder.linear_1."),
    ("time_embedding.2.", "condition_embedder.time_embedder.linear_2."),
    ("time_projection.1.", "condition_embedder.time_proj."),
    ("self_attn.", "attn1."),
    ("cross_attn.", "attn2."),
    (".q.", ".to_q."),
    (".k.", ".to_k."),
    (".v.", ".to_v."),
    (".o.", ".to_out.0."),
    ("norm3.", "norm2."),
    ("ffn.0.", "ffn.net.0.proj."),
    ("ffn.2.", "ffn.net.2."),
    ("head.head.", "proj_out."),
    ("head.modulation", "scale_shift_table"),
    ("modulation", "scale_shift_table"),
)


def diffusers_name(name):
    for old, new in RENAMES:
        name = name.replace(old, new)
    return name


class Network:
    """diffusers' Wan with weights in the original naming; x [b, c, t, h, w], timestep [b] or broadcastable."""

    def __init__(self, config, weights):
        from diffusers import WanTransformer3DModel

        self.model = WanTransformer3DModel(
            patch_size=tuple(config["patch_size"]),
            num_attention_heads=config["num_heads"],
            attention_head_dim=config["dim"] // config["num_heads"],
            in_channels=config["in_dim"],
            out_channels=config["out_dim"],
            text_dim=config["text_dim"],
            freq_dim=config["freq_dim"],
            ffn_dim=config["ffn_dim"],
            num_layers=config["num_layers"],
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            eps=1e-6,
        )
        self.model.condition_embedder.timesteps_proj = Fp64Sinusoid(config["freq_dim"])
        own = self.model.state_dict()
        renamed = {diffusers_name(name): weight for name, weight in weights.items()}
        self.model.load_state_dict({name: weight.view_as(own[name]) for name, weight in renamed.items()}, strict=True)

    def __call__(self, x, timestep, text):
        timestep = timestep.reshape(-1).float()
        with sdpa_kernel(SDPBackend.MATH):
            return self.model(x.float(), timestep, text, return_dict=False)[0]

    def jvp(self, x, timestep, text, t_x, t_timestep):
        primals = (x.float(), timestep.float())
        return torch.func.jvp(lambda *args: self(*args, text), primals, (t_x.float(), t_timestep.float()))

    def velocity(self, xt, t, text):
        return trigflow.velocity(xt, self(*trigflow.precondition(xt, t), text), t)

    def velocity_jvp(self, xt, t, text, t_xt, t_t):
        x, timestep, t_x, t_timestep = trigflow.precondition_jvp(xt, t, t_xt, t_t)
        v, t_v = self.jvp(x, timestep, text, t_x, t_timestep)
        return trigflow.velocity_jvp(xt, v, t, t_xt, t_v, t_t)

    def denoise(self, xt, t, text):
        return trigflow.denoised(xt, self(*trigflow.precondition(xt, t), text), t)


class Replay:
    """One case: the orchestration that training/step.py has to mirror."""

    def __init__(self, golden, case):
        self.golden, self.case, self.draws = golden, case, ReplayDraws(case)
        self.student, self.teacher, self.fake_score = (
            Network(golden.config, golden.weights[name]) for name in ("student", "teacher", "fake_score")
        )

    def guided(self, function, xt, t):
        scale = self.case.config["teacher_guidance"]
        conditional = function(xt, t, self.golden.cond)
        if not trigflow.needs_guidance(scale):
            return conditional
        return trigflow.guided(conditional, function(xt, t, self.golden.uncond), scale=scale)

    def normal(self, purpose):
        return self.draws.normal(purpose, self.golden.x0.shape[1:])

    def dF(self, xt, t, F_teacher):
        """(dF, F, its primal) of the student without gradient."""
        cond, h = self.golden.cond, self.case.config["fd_size"]
        t_xt, t_t = losses.tangent_seed(F_teacher, t)
        if self.case.dF_kind == "discrete":
            before = self.student.velocity(losses.discrete_xt_before(xt, F_teacher, h=h), t - h, cond)
            return losses.discrete_dF(self.student.velocity(xt, t, cond), before, t, h=h)
        if self.case.dF_kind == "semicontinuous":
            F, dF_x = self.student.velocity_jvp(xt, t, cond, t_xt, 0 * t_t)
            return losses.semicontinuous_dF(dF_x, F, self.student.velocity(xt, t - h, cond), t, h=h)
        return self.student.velocity_jvp(xt, t, cond, t_xt, t_t)[1]

    def run_scm(self):
        config = self.case.config
        t = column(timesteps.lognormal_time(self.draws.normal_scalar("time"), mean=0.7, std=1.6))
        xt = trigflow.add_noise(self.golden.x0, self.normal("noise"), t)
        with torch.no_grad():
            F_teacher = self.guided(self.teacher.velocity, xt, t)
            dF = self.dF(xt, t, F_teacher)
        F = self.student.velocity(xt, t, self.golden.cond)
        ratio = timesteps.tangent_warmup_ratio(self.case.iteration, warmup=config["tangent_warmup"])
        g, nan_mask, _ = losses.scm_tangent_target(
            F, F_teacher, dF, xt, t, warmup_ratio=ratio, sum_per_sample=BATCH_SUM
        )
        loss = config["loss_scale"] * losses.scm_loss(F, F, g, nan_mask=nan_mask)
        df_dt = -t.cos() * (F - F_teacher) - t.sin() * xt - dF
        return loss, {"time": t, "xt": xt, "F_teacher": F_teacher, "F_theta": F, "df_dt": df_dt}

    def run_dcm(self):
        config, x0 = self.case.config, self.golden.x0
        skip, total = config["dcm_skipping_interval_steps"], config["dcm_total_steps"]
        times = timesteps.dcm_times(
            self.draws.uniform("dcm_u"), skip=skip, total_steps=total, shift=config["dcm_timestep_shift"]
        )
        times = [column(t) for t in times]
        xt = x = trigflow.add_noise(x0, self.normal("noise"), times[0])
        with torch.no_grad():
            for t, t_next in pairwise(times):
                x = trigflow.euler_step(x, self.guided(self.teacher.velocity, x, t), t, t_next)
            target = self.student.denoise(x, times[-1], self.golden.cond)
        loss = losses.dcm_loss(self.student.denoise(xt, times[0], self.golden.cond), target)
        return config["loss_scale"] * loss, {"time": times[0], "xt": xt}

    def rollout(self):
        case = self.case
        times = timesteps.rollout_times(
            batch_size=self.draws.batch_size,
            steps=case.rollout_steps,
            draw=lambda purpose: timesteps.uniform_shift_time(self.draws.uniform(purpose)),
            mid_times=case.mid_times,
        )
        with torch.no_grad():
            return samplers.rollout(
                lambda xt, t: self.student.denoise(xt, t, self.golden.cond),
                self.normal("rollout_init"),
                times=[column(t) for t in times],
                fresh_noise=lambda j: self.normal(f"rollout_noise/{j}"),
            )

    def score_input(self, G):
        t = column(timesteps.uniform_shift_time(self.draws.uniform("score_time")))
        return t, trigflow.add_noise(G.detach(), self.normal("score_noise"), t)

    def run_dmd(self):
        G = self.student.denoise(*self.rollout(), self.golden.cond)
        t, xt = self.score_input(G)
        with torch.no_grad():
            x0_fake = self.fake_score.denoise(xt, t, self.golden.cond)
            x0_teacher = self.guided(self.teacher.denoise, xt, t)
        grad, nan_mask = losses.dmd_gradient(
            x0_fake, x0_teacher, G, num_elements=G[0].numel(), sum_per_sample=BATCH_SUM
        )
        loss = self.case.config["loss_scale_dmd"] * losses.dmd_loss(G, grad, nan_mask=nan_mask)
        outputs = {"G_x0": G, "D_time": t, "D_xt": xt, "x0_theta_fake": x0_fake, "x0_theta_teacher": x0_teacher}
        return loss, outputs

    def run_fake_score(self):
        with torch.no_grad():
            G = self.student.denoise(*self.rollout(), self.golden.cond)
        t, xt = self.score_input(G)
        x0_fake = self.fake_score.denoise(xt, t, self.golden.cond)
        return losses.fake_score_loss(G, x0_fake, t), {"G_x0": G, "D_time": t, "D_xt": xt, "x0_theta_fake": x0_fake}


def column(t_B):
    return t_B.view(-1, 1, 1, 1, 1)


@pytest.fixture(scope="module", params=FILES)
def golden(request):
    return load_golden(GOLDEN / request.param)


def test_network_and_its_tangent(golden):
    net = golden.net
    student = Network(golden.config, golden.weights["student"])
    timestep, t_timestep = net["timestep"].squeeze(1), net["t_timestep"].squeeze(1)
    v, t_v = student.jvp(net["x"], timestep, golden.cond, net["t_x"], t_timestep)
    assert relative_error(v, net["v"]) < 2e-6
    assert relative_error(t_v, net["t_v"]) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_case(golden, name):
    case = golden.case(name)
    replay = Replay(golden, case)
    loss, outputs = getattr(replay, f"run_{case.objective}")()
    loss = loss.flatten(1).sum(1)
    loss.sum().backward()
    bounds = case.bounds
    errors = {"loss": (relative_error(loss, case.loss), bounds.loss)}
    assert outputs.keys() == case.outputs.keys()
    for key, expected in case.outputs.items():
        errors[f"out/{key}"] = (relative_error(outputs[key].reshape(expected.shape), expected), bounds.output(key))
    parameters = dict(getattr(replay, case.trained).model.named_parameters())
    assert case.gradients
    for key, expected in case.gradients.items():
        actual = parameters[diffusers_name(key)].grad.reshape(expected.shape)
        errors[f"grad/{key}"] = (relative_error(actual, expected), bounds.gradients)
    norm = torch.linalg.vector_norm(torch.stack([p.grad.double().norm() for p in parameters.values()]))
    errors["grad_norm"] = (abs(norm.item() / case.grad_norm - 1), bounds.gradients)
    print("\n" + "\n".join(f"{name} {key}: {error:.1e} (bound {bound:.0e})" for key, (error, bound) in errors.items()))
    assert not {key: pair for key, pair in errors.items() if not pair[0] <= pair[1]}


def test_every_case_of_the_file_is_replayed(golden):
    assert {case.name for case in golden.cases} == set(CASES)


def test_replay_draws_refuses_what_was_not_drawn(golden):
    draws = ReplayDraws(golden.case("scm"))
    with pytest.raises(KeyError, match="score_time"):
        draws.uniform("score_time")
    with pytest.raises(ValueError, match="need"):
        draws.normal("noise", (1, 2, 3))
    assert ReplayDraws(golden.case("scm"), slice(1, 2)).batch_size == 1


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("scm_warmup", {"iteration": 5}),
        ("dmd", {"config": {"loss_scale_dmd": 1.001}}),
        ("scm", {"config": {"teacher_guidance": 4.9}}),
    ],
)
def test_the_bounds_notice_a_wrong_setting(golden, case, change):
    case = golden.case(case)
    case = replace(case, **{**change, "config": {**case.config, **change.get("config", {})}})
    replay = Replay(golden, case)
    loss, _ = getattr(replay, f"run_{case.objective}")()
    loss.sum().backward()
    parameters = dict(replay.student.model.named_parameters())
    errors = [
        relative_error(parameters[diffusers_name(key)].grad.view_as(expected), expected)
        for key, expected in case.gradients.items()
    ]
    assert min(errors) > case.bounds.gradients
