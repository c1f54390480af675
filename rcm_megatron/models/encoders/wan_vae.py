"""Wan's video VAE (2.1: 16 channels, 4x8x8; 2.2: 48 channels, 4x16x16) from the `vae/` folder of a diffusers checkpoint.

Latents are normalised as diffusers' Wan pipelines do. Shapes: B batch, C channels, T frames, H, W.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from rcm_megatron.models.encoders.base import EncoderError
from rcm_megatron.models.encoders.pretrained import free_memory, load_pretrained


class WanVideoEncoder:
    """AutoencoderKLWan on one device until `close`. Videos pass one at a time: peak memory does not grow with the batch."""

    def __init__(
        self,
        folder: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        tiling: bool = False,
    ) -> None:
        """`tiling` works on overlapping tiles of 256 pixels, blended: less memory, and slightly other numbers.

        EncoderError for files that cannot be used.
        """
        from diffusers import AutoencoderKLWan

        self._device, self._dtype = torch.device(device), dtype
        self._vae = load_pretrained(AutoencoderKLWan, Path(folder), torch_dtype=dtype).to(self._device)
        config = self._vae.config
        if tiling:
            self._vae.enable_tiling()
        self.latent_channels: int = config.z_dim
        self.pixel_channels: int = config.in_channels // (config.patch_size or 1) ** 2
        self.temporal_factor: int = config.scale_factor_temporal
        self.spatial_factor: int = config.scale_factor_spatial
        self._mean_C111 = self._per_channel(config.latents_mean)
        self._inverse_std_C111 = 1.0 / self._per_channel(config.latents_std)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, T, H, W) of the latents of a video of that size; EncoderError for a size that the VAE would cut."""
        factors = {"time": self.temporal_factor, "space": self.spatial_factor}
        return self.latent_channels, *latent_size(frames, height, width, **factors)

    @torch.no_grad()
    def encode(self, video_BCTHW: Tensor) -> Tensor:
        """Normalised latents, the mode of the VAE's distribution, of pixels in [-1, 1]; float32 on the CPU."""
        self._check(video_BCTHW, self.pixel_channels, "pixel")
        self.latent_shape(*video_BCTHW.shape[2:])
        return torch.stack([self._encode_one(video_CTHW) for video_CTHW in video_BCTHW])

    @torch.no_grad()
    def decode(self, latent_BCTHW: Tensor) -> Tensor:
        """Pixels within [-1, 1] of normalised latents; float32 on the CPU."""
        self._check(latent_BCTHW, self.latent_channels, "latent")
        return torch.stack([self._decode_one(latent_CTHW) for latent_CTHW in latent_BCTHW])

    def close(self) -> None:
        """Free the weights, on the GPU too."""
        self._vae = None
        free_memory(self._device)

    def _encode_one(self, video_CTHW: Tensor) -> Tensor:
        latent_1CTHW = self._vae.encode(video_CTHW[None].to(self._device, self._dtype)).latent_dist.mode()
        return ((latent_1CTHW[0] - self._mean_C111) * self._inverse_std_C111).float().cpu()

    def _decode_one(self, latent_CTHW: Tensor) -> Tensor:
        # Division by 1/std and not a product with std: the pipelines' rounding.
        latent_CTHW = latent_CTHW.to(self._device, self._dtype) / self._inverse_std_C111 + self._mean_C111
        return self._vae.decode(latent_CTHW[None], return_dict=False)[0][0].float().cpu()

    def _per_channel(self, values: list[float]) -> Tensor:
        if len(values) != self._vae.config.z_dim:
            raise EncoderError(
                f"got latents_mean or latents_std of {len(values)} channels, need z_dim={self._vae.config.z_dim}; "
                "restore the VAE's config.json"
            )
        return torch.tensor(values).view(-1, 1, 1, 1).to(self._device, self._dtype)

    def _check(self, x_BCTHW: Tensor, channels: int, name: str) -> None:
        if self._vae is None:
            raise RuntimeError(f"got a {name} video after close(), need an open encoder; build a new one")
        if x_BCTHW.ndim != 5 or x_BCTHW.shape[1] != channels or not len(x_BCTHW):
            raise EncoderError(
                f"got {name} shape {tuple(x_BCTHW.shape)}, need [B, {channels}, T, H, W] with B >= 1; reshape"
            )


def latent_size(frames: int, height: int, width: int, *, time: int, space: int) -> tuple[int, int, int]:
    """(T, H, W) of the latents of a VAE with those factors; EncoderError for a size that it would cut."""
    if frames < 1 or (frames - 1) % time:
        low = max(0, frames - 1) // time * time + 1
        raise EncoderError(f"got {frames} frames, need {time}k+1; cut to {low} or give {low + time}")
    for axis, size in (("height", height), ("width", width)):
        if size < space or size % space:
            low = size // space * space
            raise EncoderError(
                f"got {axis} {size}, need a multiple of {space}; resize or crop to {low or space} or {low + space}"
            )
    return (frames - 1) // time + 1, height // space, width // space
