"""Wan2.1 and 2.2 (arXiv 2503.20314): text-to-video, and what image conditions add to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from rcm_megatron.config.declare import Problem
from rcm_megatron.config.roles import low_noise_of
from rcm_megatron.families.family import SHARED_FLOP_ROWS, Family, PipelineCall
from rcm_megatron.families.wan.settings import MASK_CHANNELS, WanModelConfig
from rcm_megatron.registry import Lazy

if TYPE_CHECKING:
    from torch import Tensor

    from rcm_megatron.config import LatentConfig, RunConfig
    from rcm_megatron.inputs import WholeInput

_BASES = {
    "t2v": ("WanPipeline", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
    "i2v": ("WanImageToVideoPipeline", "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"),
    "ti2v": ("WanImageToVideoPipeline", "Wan-AI/Wan2.2-TI2V-5B-Diffusers"),
}
"""diffusers' class, and a checkpoint with the other components, by what a network makes of what."""
_WIDE_VAE_CHANNELS = 48
"""Of Wan2.2's VAE, which makes 16 x 16 pixels one position; Wan2.1's makes 8 x 8."""


class Wan(Family):
    name = "wan"
    title = "Wan"
    settings = WanModelConfig
    free_fields = ("conditional_frames",)
    flop_rows: ClassVar[Mapping[str, str]] = SHARED_FLOP_ROWS | {
        "text_embedding": "text",
        "image_embedding": "image",
        "cross_attn.image_linear_kv": "image",
        "time_projection": "times",
        "interval_embedding": "times",
        "interval_projection": "times",
    }
    second_time: ClassVar[Mapping[str, str | None]] = {
        "interval_embedding.linear_1.": "time_embedding.linear_1.",
        "interval_embedding.linear_2.": None,
        "interval_projection.": None,
    }
    diffusers_class = "WanTransformer3DModel"
    scheduler_space = "flow"
    network = Lazy("rcm_megatron.families.wan.network:WanModel")
    namings = Lazy("rcm_megatron.families.wan.files:NAMINGS")

    def problems(self, model: WanModelConfig, latent: LatentConfig, *, path: str) -> Iterator[Problem | str]:
        need = MASK_CHANNELS + latent.channels
        if model.condition_channels not in (0, need):
            yield (
                f"{path}.condition_channels={model.condition_channels} must be {need}: a mask of {MASK_CHANNELS} channels and an image's "
                f"latent of latent.channels={latent.channels}; or 0 for none"
            )

    def image_channels(self, image_latent_BCTHW: Tensor) -> Tensor:
        """Which frames of pixels are given, one channel for each in a latent frame, then the image's latent.

        The first latent frame is one frame of pixels, and counts as four.
        """
        import torch

        batch, _, *extent = image_latent_BCTHW.shape
        mask_BCTHW = image_latent_BCTHW.new_zeros(batch, MASK_CHANNELS, *extent)
        mask_BCTHW[:, :, 0] = 1
        return torch.cat([mask_BCTHW, image_latent_BCTHW], dim=1)

    def vae_factors(self, channels: int) -> tuple[int, int]:
        return 4, 16 if channels == _WIDE_VAE_CHANNELS else 8

    def pipeline(self, run: RunConfig) -> PipelineCall:
        kind = "ti2v" if run.model.conditional_frames else "i2v" if run.model.image.channels else "t2v"
        pipeline, base = _BASES[kind]
        if low_noise_of("student") in run.networks:
            base = f"Wan-AI/Wan2.2-{kind.upper()}-A14B-Diffusers"
        channels, frames, height, width = run.latent.shape_CTHW
        time, space = self.vae_factors(channels)
        size = (f"height={space * height}", f"width={space * width}", f"num_frames={time * (frames - 1) + 1}")
        return PipelineCall(
            pipeline=pipeline, base=base, arguments=size, makes_noise=False, takes_image=kind in ("i2v", "ti2v")
        )

    def diffusers_inputs(self, model: WanModelConfig, given: WholeInput) -> dict[str, Any]:
        extra = {}
        if given.image_BLD is not None:  # of two images, one after the other in the batch
            images = 2 if model.image_positions is not None else 1
            extra["encoder_hidden_states_image"] = given.image_BLD.unflatten(1, (images, -1)).flatten(0, 1)
        return {"hidden_states": given.with_channels(), "timestep": given.timestep_B, **extra}


WAN = Wan()
