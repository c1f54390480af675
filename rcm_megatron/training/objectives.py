"""The objectives of rCM on networks that live on many ranks: which passes each takes, and in which order.

Every objective is a sequence of passes over *all* micro-batches (rcm_megatron.parallel.pipeline), never a pass inside another's loss
function, so the same code runs on one stage and through a pipeline. The arithmetic is in rcm_megatron.diffusion. Everything stays in
token shards x_SBP (rcm_megatron.models.tokens); t_1B1 are TrigFlow times [1, B, 1] in fp64.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from rcm_megatron.config import DistillationConfig, TimeDistribution
from rcm_megatron.diffusion import losses, samplers, timesteps, trigflow
from rcm_megatron.diffusion.noise import Draws
from rcm_megatron.dual import Dual
from rcm_megatron.inputs import Condition, NetworkInput
from rcm_megatron.models.tokens import TokenLayout
from rcm_megatron.networks.inputs import dual_network_input, network_input
from rcm_megatron.networks.roles import Networks
from rcm_megatron.parallel.pipeline import (
    accumulate_gradients,
    evaluate,
    share_from_last_stage,
    timed,
)


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Samples of one micro-batch on this rank: x0_SBP tokens, text and null text [L, B, D], their random draws, and what of the
    videos the networks are given (Video2World, image-to-video)."""

    x0_SBP: Tensor
    text_LBD: Tensor
    null_text_LBD: Tensor
    draws: Draws
    condition: Condition | None = None


PER_SAMPLE = ("loss_B", "nan_B", "tangent_norm_B")
"""What losses report of each sample."""


@dataclass(frozen=True, eq=False)
class ObjectiveResult:
    """What an objective reports, per micro-batch: ``loss_B`` (unweighted, over the whole sample) and named tensors.

    ``tangent_norm_B`` is zero for objectives without a tangent. ``outputs`` holds token shards; those that a loss computes
    are on the last stage only.
    """

    loss_B: list[Tensor] = field(default_factory=list)
    nan_B: list[Tensor] = field(default_factory=list)
    tangent_norm_B: list[Tensor] = field(default_factory=list)
    outputs: dict[str, list[Tensor]] = field(default_factory=dict)


def draw_time(draws: Draws, purpose: str, distribution: TimeDistribution) -> Tensor:
    """TrigFlow times ``[b]`` of a micro-batch from the configured distribution."""
    if distribution.kind == "lognormal":
        return timesteps.lognormal_time(draws.normal_scalar(purpose), mean=distribution.mean, std=distribution.std)
    return timesteps.uniform_shift_time(draws.uniform(purpose), shift=distribution.shift)


def draw_times(batches: Sequence[MicroBatch], purpose: str, distribution: TimeDistribution) -> list[Tensor]:
    return [as_tokens(draw_time(b.draws, purpose, distribution), b.x0_SBP.device) for b in batches]


def draw_noise(layout: TokenLayout, batches: Sequence[MicroBatch], purpose: str) -> list[Tensor]:
    """Noise tokens of this rank: drawn whole from the sample's own generator, then sharded."""
    return [layout.shard(b.draws.normal(purpose, layout.latent_shape)).to(b.x0_SBP.device) for b in batches]


def as_tokens(t_B: Tensor, device: torch.device) -> Tensor:
    """Times ``[B]`` in the shape that broadcasts against tokens, ``[1, B, 1]``, in fp64."""
    return t_B.to(device, torch.float64)[None, :, None]


def draw_condition(batch: MicroBatch, *, conditional_frames: Sequence[int]) -> Condition:
    """The batch's condition with the samples' own first latent frames, of as many as one of ``conditional_frames``, all equally likely."""
    choice = (batch.draws.uniform("conditional_frames") * len(conditional_frames)).long()
    frames_B = torch.tensor(conditional_frames)[choice].to(batch.x0_SBP.device)
    return replace(batch.condition or Condition(), x0_SBP=batch.x0_SBP, frames_B=frames_B)


def given(batches: Sequence[MicroBatch]) -> tuple[list[Tensor], list[Condition | None]]:
    """What a network is told beside xt and t: text and condition of each micro-batch."""
    return [b.text_LBD for b in batches], [b.condition for b in batches]


def raw_outputs(
    chunks: Sequence[nn.Module],
    xt: Sequence[Tensor],
    t: Sequence[Tensor],
    text: Sequence[Tensor],
    conditions: Sequence[Condition | None],
    *,
    phase: str | None = None,
) -> list[Tensor]:
    """The network's outputs v at (xt, t), without gradient; timed as ``phase``."""
    return evaluate(chunks, [network_input(*args) for args in zip(xt, t, text, conditions, strict=True)], phase=phase)


def guided_outputs(
    chunks: Sequence[nn.Module],
    xt: Sequence[Tensor],
    t: Sequence[Tensor],
    batches: Sequence[MicroBatch],
    *,
    guidance: float,
) -> list[Tensor]:
    """A teacher's v with classifier-free guidance: conditional and unconditional rows in one pass of twice the batch.

    F and x0 are affine in v, so guiding v guides them alike.
    """
    if not trigflow.needs_guidance(guidance):
        return raw_outputs(chunks, xt, t, *given(batches), phase="teacher")
    text = [torch.cat([b.text_LBD, b.null_text_LBD], dim=1) for b in batches]
    conditions = [None if b.condition is None else b.condition.repeated(2) for b in batches]
    rows = ([x.repeat(1, 2, 1) for x in xt], [s.repeat(1, 2, 1) for s in t], text, conditions)
    both = raw_outputs(chunks, *rows, phase="teacher")
    halves = [v.double().chunk(2, dim=1) for v in both]
    return [trigflow.guided(conditional, unconditional, scale=guidance) for conditional, unconditional in halves]


def teacher_outputs(
    networks: Networks,
    xt: Sequence[Tensor],
    t: Sequence[Tensor],
    batches: Sequence[MicroBatch],
    settings: DistillationConfig,
) -> list[Tensor]:
    """The teacher's guided v; where it is two networks (Wan2.2 A14B), each sample's from the one of its time.

    A network sees the micro-batches in which it has a sample; with sharded weights, which ranks of other samples gather too, all of them.
    """
    guidance, low_noise = settings.teacher_guidance, networks.get("teacher_low_noise")
    if low_noise is None:
        return guided_outputs(networks["teacher"], xt, t, batches, guidance=guidance)
    is_high = [trigflow.to_rf(s) >= settings.expert_boundary for s in t]
    outputs: list[Tensor | None] = [None] * len(batches)
    for chunks, chosen in ((networks["teacher"], is_high), (low_noise, [~high for high in is_high])):
        together = isinstance(chunks[0], FSDPModule)
        asked = [i for i, rows in enumerate(chosen) if together or bool(rows.any())]
        inputs = ([values[i] for i in asked] for values in (xt, t, batches))
        found = guided_outputs(chunks, *inputs, guidance=guidance) if asked else []
        for i, v in zip(asked, found, strict=True):
            outputs[i] = v if outputs[i] is None else torch.where(chosen[i], v, outputs[i])
    return outputs


def mean_loss(elements: Tensor, *, weight: float) -> Tensor:
    """The scalar that the schedules expect: this rank's sum over tokens, mean over the micro-batch."""
    return weight * elements.sum() / elements.shape[1]


def report(layout: TokenLayout, elements: Tensor, *, nan_mask: Tensor | None = None) -> dict[str, Tensor]:
    """Loss of each whole sample ``[B]`` and which are masked; new tensors, because schedules scale losses in place."""
    loss_B = layout.sum_per_sample(elements)[0, :, 0]
    nan_B = torch.zeros_like(loss_B, dtype=torch.bool) if nan_mask is None else nan_mask[0, :, 0]
    return {"loss_B": loss_B, "nan_B": nan_B}


def scm(
    networks: Networks,
    batches: Sequence[MicroBatch],
    settings: DistillationConfig,
    *,
    warmup_ratio: float,
    weight: float,
    is_last: bool = True,
) -> ObjectiveResult:
    """Continuous-time consistency (forward divergence): rCM Algorithm 1, sCM (arXiv 2410.11081) section 5.1."""
    layout = networks.layout
    t = draw_times(batches, "time", settings.p_g)
    noise = draw_noise(layout, batches, "noise")
    xt = [trigflow.add_noise(b.x0_SBP, n, s) for b, n, s in zip(batches, noise, t, strict=True)]
    v = teacher_outputs(networks, xt, t, batches, settings)
    F_teacher = [trigflow.velocity(*args) for args in zip(xt, v, t, strict=True)]
    passes = [
        ScmPass(layout, settings, warmup_ratio, weight, *args) for args in zip(batches, xt, t, F_teacher, strict=True)
    ]
    before = _difference_outputs(networks, passes, settings)
    for scm_pass, F_before in zip(passes, before, strict=True):
        scm_pass.F_before = F_before
    inputs, losses_of = [p.network_input() for p in passes], [p.loss for p in passes]
    phase = "student" if settings.jvp_kind == "finite_difference" else "dual"
    reports = accumulate_gradients(networks["student"], inputs, losses_of, is_last=is_last, phase=phase)
    return _collect(networks, batches, reports, {"xt": xt, "time": t, "F_teacher": F_teacher})


def _difference_outputs(
    networks: Networks, passes: "list[ScmPass]", settings: DistillationConfig
) -> list[Tensor | None]:
    """F(x, t − h) for the two variants that take a finite difference; nothing for the exact one."""
    if settings.jvp_kind == "exact":
        return [None] * len(passes)
    h = settings.fd_size
    t = [p.t - h for p in passes]
    xt = [p.xt for p in passes]
    if settings.jvp_kind == "finite_difference":
        xt = [losses.discrete_xt_before(p.xt, p.F_teacher, h=h) for p in passes]
    v = raw_outputs(networks["student"], xt, t, *given([p.batch for p in passes]), phase="student")
    return [trigflow.velocity(*args) for args in zip(xt, v, t, strict=True)]


@dataclass(eq=False)
class ScmPass:
    """The student's pass of one micro-batch: which tangent goes in, and the loss that comes out."""

    layout: TokenLayout
    settings: DistillationConfig
    warmup_ratio: float
    weight: float
    batch: MicroBatch
    xt: Tensor
    t: Tensor
    F_teacher: Tensor
    F_before: Tensor | None = None

    @property
    def tangents(self) -> tuple[Tensor, Tensor]:
        """Tangents of (xt, t); the semicontinuous variant leaves time to a difference."""
        t_xt, t_t = losses.tangent_seed(self.F_teacher, self.t)
        return (t_xt, t_t) if self.settings.jvp_kind == "exact" else (t_xt, torch.zeros_like(t_t))

    def network_input(self) -> NetworkInput:
        if self.settings.jvp_kind == "finite_difference":
            return network_input(self.xt, self.t, self.batch.text_LBD, self.batch.condition)
        return dual_network_input(self.xt, self.t, *self.tangents, self.batch.text_LBD, self.batch.condition)

    def loss(self, v: Tensor | Dual) -> tuple[Tensor, dict[str, Tensor]]:
        F, dF = self._velocity(v)
        g, nan_mask, tangent_norm = losses.scm_tangent_target(
            F.detach(),
            self.F_teacher,
            dF,
            self.xt,
            self.t,
            warmup_ratio=self.warmup_ratio,
            scale_jvp_by_warmup=self.settings.scale_jvp_by_warmup,
            sum_per_sample=self.layout.sum_per_sample,
        )
        elements = losses.scm_loss(F, F.detach(), g, nan_mask=nan_mask)
        reported = report(self.layout, elements, nan_mask=nan_mask)
        reported |= {"tangent_norm_B": tangent_norm[0, :, 0], "F_theta": F.detach(), "dF": dF}
        return mean_loss(elements, weight=self.weight), reported

    def _velocity(self, v: Tensor | Dual) -> tuple[Tensor, Tensor]:
        if self.settings.jvp_kind == "finite_difference":
            F = trigflow.velocity(self.xt, v, self.t)
            return F, losses.discrete_dF(F.detach(), self.F_before, self.t, h=self.settings.fd_size)
        t_xt, t_t = self.tangents
        F, dF = trigflow.velocity_jvp(self.xt, v.primal, self.t, t_xt, v.tangent, t_t)
        dF = dF.detach()
        if self.settings.jvp_kind == "semicontinuous":
            dF = losses.semicontinuous_dF(dF, F.detach(), self.F_before, self.t, h=self.settings.fd_size)
        return F, dF


def dcm(
    networks: Networks,
    batches: Sequence[MicroBatch],
    settings: DistillationConfig,
    *,
    weight: float,
    is_last: bool = True,
) -> ObjectiveResult:
    """Discrete consistency: the student's x0 at t_0 meets its own at t_skip after teacher Euler steps."""
    layout, grid = networks.layout, settings.dcm
    noise = draw_noise(layout, batches, "noise")
    times = []
    for b in batches:
        u = b.draws.uniform("dcm_u")
        grid_times = timesteps.dcm_times(u, skip=grid.skip, total_steps=grid.total_steps, shift=grid.shift)
        times.append([as_tokens(t, b.x0_SBP.device) for t in grid_times])
    first = [t[0] for t in times]
    xt = [trigflow.add_noise(b.x0_SBP, n, t) for b, n, t in zip(batches, noise, first, strict=True)]
    x = xt
    for j in range(grid.skip):
        t, after = [s[j] for s in times], [s[j + 1] for s in times]
        v = teacher_outputs(networks, x, t, batches, settings)
        F = [trigflow.velocity(*args) for args in zip(x, v, t, strict=True)]
        x = [trigflow.euler_step(*args) for args in zip(x, F, t, after, strict=True)]
    last = [t[-1] for t in times]
    v = raw_outputs(networks["student"], x, last, *given(batches), phase="student")
    targets = [trigflow.denoised(*args) for args in zip(x, v, last, strict=True)]

    def loss_of(xt: Tensor, t: Tensor, target: Tensor):
        def loss(v: Tensor):
            elements = losses.dcm_loss(trigflow.denoised(xt, v, t), target)
            return mean_loss(elements, weight=weight), report(layout, elements)

        return loss

    inputs = [network_input(*args) for args in zip(xt, first, *given(batches), strict=True)]
    losses_of = [loss_of(*a) for a in zip(xt, first, targets, strict=True)]
    reports = accumulate_gradients(networks["student"], inputs, losses_of, is_last=is_last, phase="student")
    return _collect(
        networks, batches, reports, {"xt": xt, "time": first, "x_skip": x, "time_skip": last, "x0_target": targets}
    )


@dataclass(frozen=True, eq=False)
class Rollout:
    """The last step of a backward simulation: its input xt at time t, and the sample G that the student makes of it."""

    xt: list[Tensor]
    t: list[Tensor]
    G: list[Tensor]


def _draw_p_d(draws: Draws, settings: DistillationConfig, purpose: str) -> Tensor:
    return draw_time(draws, purpose, settings.p_d)


def rollout(networks: Networks, batches: Sequence[MicroBatch], settings: DistillationConfig, *, steps: int) -> Rollout:
    """Backward simulation: ``steps`` student steps from pure noise, re-noised in between, without gradient.

    The arithmetic is on the samples of all micro-batches at once, the network's passes on one after the other.
    """
    device, sizes = batches[0].x0_SBP.device, [b.draws.batch_size for b in batches]
    times_of = [
        timesteps.rollout_times(
            batch_size=b.draws.batch_size,
            steps=steps,
            draw=partial(_draw_p_d, b.draws, settings),
            mid_times=settings.fixed_rollout_times,
        )
        for b in batches
    ]
    times = [as_tokens(torch.cat(of_step), device) for of_step in zip(*times_of, strict=True)]

    def noise(purpose: str) -> Tensor:
        return torch.cat(draw_noise(networks.layout, batches, purpose), dim=1)

    def denoise(xt: Tensor, t: Tensor) -> Tensor:
        split = (whole.split(sizes, dim=1) for whole in (xt, t))
        v = raw_outputs(networks["student"], *split, *given(batches), phase="rollout")
        return trigflow.denoised(xt, torch.cat(v, dim=1), t)

    start = noise("rollout_init").double()
    xt, t = samplers.rollout(denoise, start, times=times, fresh_noise=lambda j: noise(f"rollout_noise/{j}"))
    return Rollout(*(list(whole.split(sizes, dim=1)) for whole in (xt, t, denoise(xt, t))))


def noise_again(networks: Networks, batches: Sequence[MicroBatch], G: Sequence[Tensor], settings: DistillationConfig):
    """Times from p_D and the generated samples noised to them, where the scores are compared."""
    t = draw_times(batches, "score_time", settings.p_d)
    noise = draw_noise(networks.layout, batches, "score_noise")
    return t, [trigflow.add_noise(*args) for args in zip(G, noise, t, strict=True)]


def dmd(
    networks: Networks,
    batches: Sequence[MicroBatch],
    settings: DistillationConfig,
    *,
    rollout_steps: int,
    weight: float,
    is_last: bool = True,
) -> ObjectiveResult:
    """Distribution matching (reverse divergence, DMD2 arXiv 2405.14867) on a rollout of the student.

    The target needs the finished rollout, fake score and teacher; then the rollout's last step runs once more with gradient.
    """
    layout = networks.layout
    simulated = rollout(networks, batches, settings, steps=rollout_steps)
    t, xt = noise_again(networks, batches, simulated.G, settings)
    v_fake = raw_outputs(networks["fake_score"], xt, t, *given(batches), phase="fake_score")
    v_teacher = teacher_outputs(networks, xt, t, batches, settings)
    x0_fake = [trigflow.denoised(*args) for args in zip(xt, v_fake, t, strict=True)]
    x0_teacher = [trigflow.denoised(*args) for args in zip(xt, v_teacher, t, strict=True)]

    def loss_of(xt: Tensor, t: Tensor, G: Tensor, fake: Tensor, teacher: Tensor):
        grad, nan_mask = losses.dmd_gradient(
            fake, teacher, G, num_elements=layout.num_elements, sum_per_sample=layout.sum_per_sample
        )

        def loss(v: Tensor):
            again = trigflow.denoised(xt, v, t)
            elements = losses.dmd_loss(again, grad, nan_mask=nan_mask)
            reported = report(layout, elements, nan_mask=nan_mask)
            drift = (again.detach() - G).abs().amax() / G.abs().amax().clamp(min=1e-12)
            return mean_loss(elements, weight=weight), reported | {"rollout_drift": drift}

        return loss

    inputs = [network_input(*args) for args in zip(simulated.xt, simulated.t, *given(batches), strict=True)]
    stored = zip(simulated.xt, simulated.t, simulated.G, x0_fake, x0_teacher, strict=True)
    losses_of = [loss_of(*args) for args in stored]
    reports = accumulate_gradients(networks["student"], inputs, losses_of, is_last=is_last, phase="student")
    named = {"G_x0": simulated.G, "D_xt": xt, "D_time": t, "x0_theta_fake": x0_fake, "x0_theta_teacher": x0_teacher}
    return _collect(networks, batches, reports, named)


def critic(
    networks: Networks,
    batches: Sequence[MicroBatch],
    settings: DistillationConfig,
    *,
    rollout_steps: int,
    is_last: bool = True,
) -> ObjectiveResult:
    """The fake score learns to denoise what the current student generates; no guidance."""
    layout = networks.layout
    simulated = rollout(networks, batches, settings, steps=rollout_steps)
    t, xt = noise_again(networks, batches, simulated.G, settings)

    def loss_of(xt: Tensor, t: Tensor, G: Tensor):
        def loss(v: Tensor):
            x0_fake = trigflow.denoised(xt, v, t)
            elements = losses.critic_loss(G, x0_fake, t)
            return mean_loss(elements, weight=1.0), report(layout, elements) | {"x0_theta_fake": x0_fake.detach()}

        return loss

    inputs = [network_input(*args) for args in zip(xt, t, *given(batches), strict=True)]
    losses_of = [loss_of(*a) for a in zip(xt, t, simulated.G, strict=True)]
    reports = accumulate_gradients(networks["fake_score"], inputs, losses_of, is_last=is_last, phase="critic")
    return _collect(networks, batches, reports, {"G_x0": simulated.G, "D_xt": xt, "D_time": t})


def flow_matching(
    networks: Networks,
    batches: Sequence[MicroBatch],
    settings: DistillationConfig,
    *,
    weight: float,
    is_last: bool = True,
) -> ObjectiveResult:
    """Flow matching (arXiv 2210.02747): trains the student network as a teacher, with caption dropout."""
    layout = networks.layout
    t = draw_times(batches, "flow_time", settings.flow.times)
    noise = draw_noise(layout, batches, "flow_noise")
    xt = [trigflow.add_noise(b.x0_SBP, n, s) for b, n, s in zip(batches, noise, t, strict=True)]

    def text_of(b: MicroBatch) -> Tensor:
        dropped = (b.draws.uniform("flow_caption") < settings.flow.caption_dropout).to(b.text_LBD.device)
        return torch.where(dropped[None, :, None], b.null_text_LBD, b.text_LBD)

    def loss_of(x0: Tensor, noise: Tensor) -> Callable:
        def loss(v: Tensor):
            elements = layout.mask(losses.flow_matching_loss(v, x0, noise))
            return mean_loss(elements, weight=weight), report(layout, elements)

        return loss

    inputs = [network_input(x, s, text_of(b), b.condition) for x, s, b in zip(xt, t, batches, strict=True)]
    losses_of = [loss_of(b.x0_SBP, n) for b, n in zip(batches, noise, strict=True)]
    reports = accumulate_gradients(networks["student"], inputs, losses_of, is_last=is_last, phase="student")
    return _collect(networks, batches, reports, {"xt": xt, "time": t})


def _collect(
    networks: Networks,
    batches: Sequence[MicroBatch],
    reports: Sequence[dict[str, Tensor]],
    outputs: dict[str, list[Tensor]],
) -> ObjectiveResult:
    """Losses on every stage. What else the losses report stays on the last stage, which computed it."""
    result = ObjectiveResult(outputs=dict(outputs))
    for reported in reports:
        for name, value in reported.items():
            if name not in PER_SAMPLE:
                result.outputs.setdefault(name, []).append(value)
    sizes = [batch.x0_SBP.shape[1] for batch in batches]
    values = torch.zeros(len(PER_SAMPLE), sum(sizes), dtype=torch.float64, device=batches[0].x0_SBP.device)
    for row, name in zip(values, PER_SAMPLE, strict=True):
        if reports and name in reports[0]:
            row.copy_(torch.cat([reported[name] for reported in reports]))
    with timed(networks["student"], "stages"):
        share_from_last_stage(values, group=networks.layout.groups.pp)
    loss, nan, tangent_norm = (list(row.split(sizes)) for row in values)
    return replace(result, loss_B=loss, nan_B=[mask.bool() for mask in nan], tangent_norm_B=tangent_norm)
