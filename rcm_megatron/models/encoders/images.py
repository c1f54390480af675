"""From a picture to what image-to-video networks are given of it: pixels, and latents of a video that begins with it.

Shapes: C channels, T frames, H, W.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rcm_megatron.models.encoders.base import EncoderError
from rcm_megatron.models.encoders.wan_vae import WanVideoEncoder

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 64 * 2**20
"""Of a picture: a file of some kilobytes may claim to hold gigabytes."""


def load_image(path: str | Path) -> Image:
    """The RGB picture of a PNG, JPEG or WebP file, turned upright, without transparency. EncoderError for any other file."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(
                    f"it has {image.width} x {image.height} pixels, need at most {MAX_PIXELS}; make it smaller"
                )
            return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # OSError, SyntaxError, ValueError, DecompressionBombError: each decoder has its own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        need = f"need a whole {', '.join(IMAGE_FORMATS)} file"
        raise EncoderError(f"image {path} cannot be used: {reason}; {need}") from error


def image_pixels(image: Image, *, height: int, width: int) -> Tensor:
    """Pixels [C, H, W] in [-1, 1], float32, of the picture resized to that size, as diffusers' pipelines do: stretched, not cropped."""
    from diffusers.video_processor import VideoProcessor

    return VideoProcessor(vae_scale_factor=1).preprocess(image, height=height, width=width)[0]


def image_latent(encoder: WanVideoEncoder, pixels_CHW: Tensor, *, frames: int) -> Tensor:
    """Latent [C', T', H', W'] of a video of T' = `frames` latent frames: the picture, then grey (zeros).

    The VAE is causal: the first latent frame, all of it with `frames=1`, is that of any video which begins with the picture.
    """
    rest = encoder.temporal_factor * (frames - 1)
    grey_CTHW = torch.zeros(pixels_CHW.shape[0], rest, *pixels_CHW.shape[1:])
    return encoder.encode(torch.cat([pixels_CHW[:, None], grey_CTHW], dim=1)[None])[0]
