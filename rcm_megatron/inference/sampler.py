"""Sampling from trained networks on any layout: noise is drawn per sample, denoised in token shards, gathered at the end."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from rcm_megatron.config import SamplingConfig
from rcm_megatron.diffusion import flow_maps, samplers, trigflow
from rcm_megatron.diffusion.noise import SeededDraws
from rcm_megatron.inputs import Condition, NetworkInput
from rcm_megatron.models.tokens import TokenLayout
from rcm_megatron.networks.inputs import network_input
from rcm_megatron.parallel.pipeline import evaluate, unwrapped


@dataclass(frozen=True, eq=False)
class LowNoiseExpert:
    """The second network of a role that is two: it takes the steps at RF times below ``boundary``."""

    chunks: Sequence[nn.Module]
    boundary: float


@dataclass(frozen=True, eq=False)
class Sampler:
    """Draws videos from one network for the captions in ``text_LBD`` [L, B, D].

    Noise depends on (seed, sample index) alone, so every network, step count and layout starts from the same.
    """

    chunks: Sequence[nn.Module]
    layout: TokenLayout
    text_LBD: Tensor
    null_text_LBD: Tensor | None
    """None will do without guidance."""
    seed: int
    sample_indices: Sequence[int]
    condition: Condition | None = None
    """What the network is given of the videos: first latent frames, which samples then begin with, or an image."""
    low_noise: LowNoiseExpert | None = None
    """Where ``chunks`` is one of two networks: the other."""

    def student(self, *, steps: int, mid_times: Sequence[float], sigma_max: float | None) -> Tensor:
        """Latents [B, C, T, H, W] in ``steps`` network evaluations."""
        x_SBP = samplers.student_sample(
            self._denoise,
            self._noise("sample_noise"),
            steps=steps,
            fresh_noise=lambda j: self._noise(f"sample_renoise/{j}"),
            mid_times=mid_times,
            sigma_max=sigma_max,
        )
        return self.layout.gather(x_SBP).float()

    def flow_map(self, *, steps: int, shift: float, sigma_max: float | None) -> Tensor:
        """Latents [B, C, T, H, W] of a student of two times in any number of steps, each from its time to the next."""
        noise = self._noise("sample_noise")
        x_SBP = samplers.flow_map_sample(self._map, noise, steps=steps, shift=shift, sigma_max=sigma_max)
        return self.layout.gather(x_SBP).float()

    def teacher(self, *, steps: int, guidance: float, shift: float, method: Literal["euler", "unipc"]) -> Tensor:
        """Latents [B, C, T, H, W]; with guidance above 1 every step takes two network evaluations."""

        def velocity(x_SBP: Tensor, s: float) -> Tensor:
            return self._at(s)._guided_velocity(x_SBP, s, guidance=guidance)

        solve = {"euler": samplers.euler_sample, "unipc": samplers.unipc_sample}[method]
        return self.layout.gather(solve(velocity, self._noise("sample_noise"), steps=steps, shift=shift)).float()

    def _noise(self, purpose: str) -> Tensor:
        draws = SeededDraws(self.seed, 0, self.sample_indices)
        return self.layout.shard(draws.normal(purpose, self.layout.latent_shape)).to(self.text_LBD.device)

    def _at(self, s: float) -> "Sampler":
        """The sampler of the network that takes a step at RF time ``s``."""
        has_low_noise = self.low_noise is not None and s < self.low_noise.boundary
        return replace(self, chunks=self.low_noise.chunks, low_noise=None) if has_low_noise else self

    def _denoise(self, xt_SBP: Tensor, t: Tensor) -> Tensor:
        return trigflow.denoised(xt_SBP, self._student_velocity(xt_SBP, t, torch.zeros_like(t)), t)

    def _map(self, xt_SBP: Tensor, t: Tensor, s: Tensor) -> Tensor:
        F = trigflow.velocity(xt_SBP, self._student_velocity(xt_SBP, t, s), t)
        return flow_maps.flow_map(xt_SBP, F, t, s)

    def _student_velocity(self, xt_SBP: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """v at t; of a network of two times on the way to s."""
        network = self._at(float(trigflow.to_rf(t)))
        t_1B1, s_1B1 = (time.expand(1, xt_SBP.shape[1], 1) for time in (t, s))
        second = s_1B1 if unwrapped(network.chunks[0]).model.second_time else None
        return network._evaluate(network_input(xt_SBP, t_1B1, self.text_LBD, self.condition, s_1B1=second))

    def _guided_velocity(self, x_SBP: Tensor, s: float, *, guidance: float) -> Tensor:
        text, condition = self.text_LBD, self.condition
        if trigflow.needs_guidance(guidance):
            condition = None if condition is None else condition.repeated(2)
            x_SBP, text = x_SBP.repeat(1, 2, 1), torch.cat([text, self.null_text_LBD], dim=1)
        timestep = torch.full(
            (1, x_SBP.shape[1]), trigflow.TIMESTEP_SCALE * s, dtype=torch.float32, device=x_SBP.device
        )
        v = self._evaluate(NetworkInput(x_SBP, timestep, text, condition))
        if not trigflow.needs_guidance(guidance):
            return v
        return trigflow.guided(*v.double().chunk(2, dim=1), scale=guidance)

    def _evaluate(self, whole: NetworkInput) -> Tensor:
        """The network's output; pipeline stages work on parts of the batch (of one size, as schedules want) at a time."""
        parts = math.gcd(whole.batch, self.layout.groups.pp_size)
        return evaluate(self.chunks, whole, micro_batch_size=whole.batch // parts)


def teacher_evaluations(steps: int, *, guidance: float) -> int:
    """Network evaluations of a teacher sample."""
    return steps * (2 if trigflow.needs_guidance(guidance) else 1)


def student_videos(sampler: Sampler, settings: SamplingConfig) -> dict[int, Tensor]:
    """Student latents by number of steps."""
    return {steps: student_latents(sampler, settings, steps=steps) for steps in settings.student_steps}


def student_latents(sampler: Sampler, settings: SamplingConfig, *, steps: int) -> Tensor:
    """Student latents [B, C, T, H, W] of ``steps`` steps of the sampler that the settings name."""
    if settings.student_sampler == "flow_map":
        return sampler.flow_map(steps=steps, shift=settings.student_shift, sigma_max=settings.sigma_max)
    return sampler.student(steps=steps, mid_times=settings.student_times, sigma_max=settings.sigma_max)
