"""Settings of a Cosmos-Predict2 network."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from rcm_megatron.config.declare import Positive, PositiveFloat, Problem
from rcm_megatron.config.model import ModelConfig


@dataclass(frozen=True, kw_only=True)
class CosmosModelConfig(ModelConfig):
    """Cosmos-Predict2 (names as in diffusers' CosmosTransformer3DModel). `conditional_frames` is Video2World: a channel says which latent
    frames are given, and each frame has a timestep of its own."""

    family: Literal["cosmos"] = "cosmos"
    adaln_lora_dim: Positive = 256
    """Rank of each sublayer's modulation by the time embedding."""
    rope_scale: tuple[PositiveFloat, PositiveFloat, PositiveFloat]
    """(frames, rows, columns) by which RoPE is stretched: base 10000 * scale ** (d / (d - 2)) for d channels of an axis."""
    rope_fps: PositiveFloat | None = None
    """Frames a second of the latents' videos: time runs in steps of 24 / rope_fps. null: one a frame, as NVIDIA's release has it for images
    and videos; diffusers' Video2World pipeline does the same when it is called with fps=24."""
    max_size: tuple[Positive, Positive, Positive] = (128, 240, 240)
    """Largest latent (frames, height, width); with learnable_positions the size of their tables."""
    condition_sigma: PositiveFloat = 1e-4
    """Noise level that the given frames are announced to have (diffusers' sigma_conditioning)."""
    padding_mask: bool = True
    """A channel that marks borders of the picture without content. Here it is always zero: latents are whole pictures."""
    learnable_positions: bool = False
    """Normalised learned positions added before every block (Cosmos 1.0; not in Predict2)."""
    qk_norm_eps: PositiveFloat = 1e-5
    """diffusers' value; NVIDIA's release computes with 1e-6."""

    @property
    def extra_channels(self) -> int:
        """Input channels beside the latent's: masks."""
        return self.conditional_frames + self.padding_mask

    @property
    def embedded_channels(self) -> int:
        """The latent's channels and the masks'."""
        return self.in_channels + self.extra_channels

    def check(self, path: str) -> Iterator[str | Problem]:
        """RoPE is stretched by a power of d / (d - 2)."""
        yield from super().check(path)
        if self.head_dim < 12:
            yield f"{path}.hidden_size / num_heads = {self.head_dim} must be at least 12 to stretch RoPE; lower {path}.num_heads"
