"""Settings of a Wan network."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from rcm_megatron.config.declare import Change, NotNegative, Positive, Problem, until_refused
from rcm_megatron.config.model import ImageInputs, ModelConfig

MASK_CHANNELS = 4
"""Of condition_channels, the first: one for each frame of pixels in a latent frame."""
CLIP_TOKENS = 257
"""Of one image: ViT-H/14 at 224 x 224, 16 * 16 patches and the class token."""


@dataclass(frozen=True, kw_only=True)
class WanModelConfig(ModelConfig):
    """Wan2.1 and 2.2. `hidden_size` is `dim` in the release, `ffn_hidden_size` its `ffn_dim`. What images add is off by default, and
    `conditional_frames` is Wan2.2 TI2V: given latent frames are in their place, clean and at time 0."""

    family: Literal["wan"] = "wan"
    freq_dim: Positive = 256
    """Width of the sinusoid that embeds the timestep."""
    cross_attn_norm: bool = True
    """Affine LayerNorm before cross-attention (the release's norm3)."""
    condition_channels: NotNegative = 0
    """Channels concatenated to the latent's before the patch embedding. Image-to-video: 20, a mask of 4 and the image's latent of 16."""
    image_dim: Positive | None = None
    """Width of the CLIP features of an image, which blocks attend to beside the text (Wan2.1 image-to-video: 1280). null: none."""
    image_positions: Positive | None = None
    """CLIP tokens that have a learned position (diffusers' pos_embed_seq_len; first and last frame: 2 * 257). null: no positions."""

    @property
    def embedded_channels(self) -> int:
        """The latent's channels and a condition's."""
        return self.in_channels + self.condition_channels

    @property
    def image(self) -> ImageInputs:
        """Condition channels, and CLIP tokens: 257 of one image, or as many as have a position."""
        tokens = 0 if self.image_dim is None else self.image_positions or CLIP_TOKENS
        return ImageInputs(channels=self.condition_channels, tokens=tokens, dim=self.image_dim)

    def check(self, path: str) -> Iterator[str | Problem]:
        """Of the sinusoid, and of positions, which are those of CLIP tokens."""
        yield from super().check(path)
        yield from until_refused(self._sinusoid(path))
        if self.image_positions is not None and self.image_dim is None:
            yield (
                f"{path}.image_positions={self.image_positions} places CLIP tokens, but {path}.image_dim=null has none; set it (1280), or "
                "image_positions to null"
            )

    def _sinusoid(self, path: str) -> Iterator[Problem]:
        if self.freq_dim % 2:
            yield Problem(
                f"{path}.freq_dim={self.freq_dim} must be even (sines and cosines)",
                (Change(f"{path}.freq_dim", (self.freq_dim + 1, self.hidden_size)),),
            )
