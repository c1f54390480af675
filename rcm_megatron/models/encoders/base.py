"""What stands between videos and captions and the transformer: the two interfaces.

Shapes: B batch, C channels, T frames, H, W, L text positions (always the full text_len), D text width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from rcm_megatron.errors import UserError


class EncoderError(UserError, ValueError):
    """Encoder files or inputs that cannot be used; the message says got, need and fix."""


@runtime_checkable
class VideoEncoder(Protocol):
    """Pixels in [-1, 1] to normalised latents and back. Results are float32 on the CPU."""

    latent_channels: int

    def encode(self, video_BCTHW: Tensor) -> Tensor:
        """Latents [B, C', T', H', W'] of pixel videos [B, C, T, H, W]."""
        ...

    def decode(self, latent_BCTHW: Tensor) -> Tensor:
        """Pixel videos [B, C, T, H, W], within [-1, 1], of latents [B, C', T', H', W']."""
        ...

    def close(self) -> None:
        """Free the weights; `contextlib.closing` makes a `with` of it. The encoder cannot be used after."""
        ...


@runtime_checkable
class TextEncoder(Protocol):
    """Captions to embeddings of one length. Results are on the CPU, in the encoder's dtype."""

    text_len: int
    text_dim: int
    negative_prompt: str
    """Caption of the unconditional branch of classifier-free guidance."""

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Embeddings [B, L, D], zeros after each caption's last token (the transformer attends to those zeros too)."""
        ...

    def close(self) -> None:
        """Free the weights; `contextlib.closing` makes a `with` of it. The encoder cannot be used after."""
        ...
