"""Cosmos-Predict2 (arXiv 2501.03575, 2511.00062): Text2Image and Video2World."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from rcm_megatron.config.declare import Change, Problem
from rcm_megatron.config.model import AXES
from rcm_megatron.families.cosmos.settings import CosmosModelConfig
from rcm_megatron.families.family import SHARED_FLOP_ROWS, Family, PipelineCall
from rcm_megatron.registry import Lazy

if TYPE_CHECKING:
    from rcm_megatron.config import LatentConfig, RunConfig
    from rcm_megatron.inputs import WholeInput

ROPE_FPS = 24.0
"""Frames a second at which a latent frame lasts one position."""
_DIFFUSERS_QK_EPS = 1e-5
"""Of q/k norms in diffusers; NVIDIA's release computes with 1e-6."""
_BASES = {
    "t2i": ("Cosmos2TextToImagePipeline", "nvidia/Cosmos-Predict2-2B-Text2Image"),
    "v2w": ("Cosmos2VideoToWorldPipeline", "nvidia/Cosmos-Predict2-2B-Video2World"),
}
"""diffusers' class, and a checkpoint with the other components, by what a network makes of what."""


class Cosmos(Family):
    name = "cosmos"
    title = "Cosmos-Predict2"
    settings = CosmosModelConfig
    free_fields = ("rope_fps", "condition_sigma", "qk_norm_eps")
    flop_rows: ClassVar[Mapping[str, str]] = SHARED_FLOP_ROWS | {
        "self_attn_modulation": "times",
        "cross_attn_modulation": "times",
        "mlp_modulation": "times",
        "head.modulation": "times",
        "interval_embedding": "times",
    }
    second_time: ClassVar[Mapping[str, str | None]] = {
        "interval_embedding.linear_1.": "time_embedding.linear_1.",
        "interval_embedding.linear_2.": None,
        "interval_embedding.norm_weight": None,
    }
    diffusers_class = "CosmosTransformer3DModel"
    scheduler_space = "edm"
    network = Lazy("rcm_megatron.families.cosmos.network:CosmosModel")
    namings = Lazy("rcm_megatron.families.cosmos.files:NAMINGS")

    def problems(self, model: CosmosModelConfig, latent: LatentConfig, *, path: str) -> Iterator[Problem | str]:
        axes = zip(AXES, latent.shape_CTHW[1:], model.max_size, strict=True)
        for axis, size, most in axes if model.learnable_positions else ():
            if size > most:
                yield Problem(
                    f"latent.{axis}={size} exceeds {path}.max_size={list(model.max_size)}",
                    (Change(f"latent.{axis}", range(most, 0, -1)),),
                )

    def pipeline(self, run: RunConfig) -> PipelineCall:
        kind = "v2w" if run.model.conditional_frames else "t2i"
        pipeline, base = _BASES[kind]
        channels, frames, height, width = run.latent.shape_CTHW
        time, space = self.vae_factors(channels)
        call = (f"height={space * height}", f"width={space * width}")
        if kind == "v2w":  # the pipeline's own 16 frames a second would stretch time as the network was not trained
            call += (f"num_frames={time * (frames - 1) + 1}", f"fps={run.model.rope_fps or ROPE_FPS:g}")
        return PipelineCall(pipeline=pipeline, base=base, arguments=call, makes_noise=True, takes_image=kind == "v2w")

    def diffusers_inputs(self, model: CosmosModelConfig, given: WholeInput) -> dict[str, Any]:
        """No frames given, a whole picture, and time in [0, 1]."""
        x_BCTHW = given.x_BCTHW
        return {
            "hidden_states": x_BCTHW,
            "timestep": given.timestep_B / 1000,
            "fps": model.rope_fps,
            "padding_mask": x_BCTHW.new_zeros(1, 1, *x_BCTHW.shape[-2:]),
            "condition_mask": x_BCTHW[:, :1] * 0 if model.conditional_frames else None,
        }

    def as_diffusers(self, model: CosmosModelConfig) -> CosmosModelConfig:
        return replace(model, qk_norm_eps=_DIFFUSERS_QK_EPS)

    def largest_latent(self, model: CosmosModelConfig) -> tuple[float, float, float]:
        return model.max_size


COSMOS = Cosmos()
