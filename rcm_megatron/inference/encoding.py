"""The encoders of a run where it needs them: loaded, used, freed."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

from torch import Tensor
from torch.distributed import ProcessGroup

from rcm_megatron.config import RunConfig
from rcm_megatron.data.samples import load_caption_embedding
from rcm_megatron.errors import InputError
from rcm_megatron.models.encoders import (
    VideoEncoder,
    build_image_encoder,
    build_text_encoder,
    build_video_encoder,
    check_encoder_files,
    image_latent,
    image_pixels,
)
from rcm_megatron.parallel.broadcast import computed_once
from rcm_megatron.platform.device import this_device

if TYPE_CHECKING:
    from PIL.Image import Image


log = logging.getLogger(__name__)

_STRETCH = 1.05
"""Change of a picture's proportions that is worth a word."""


def check_encoders(run: RunConfig) -> None:
    """ConfigError if files of the run's encoders are missing or do not fit its model. Takes milliseconds."""
    sizes = {"latent_channels": run.latent.channels, "text_dim": run.model.text_dim, "image_dim": run.model.image.dim}
    check_encoder_files(run.encoders, **sizes)


def encode_captions(run: RunConfig, captions: Sequence[str | None], *, group: ProcessGroup | None = None) -> Tensor:
    """Embeddings [L, N, D] by the run's text encoder, float32 on the CPU; None stands for its negative prompt.

    Call on all ranks of `group` (default: all ranks): its first one loads the encoder, encodes and frees it, the others receive.
    InputError on all of them where the run has no text encoder, it cannot be loaded, or it does not know a word.
    """

    def encode() -> Tensor:
        model, device = run.model, this_device()
        encoder = build_text_encoder(run.encoders, text_len=model.text_len, text_dim=model.text_dim, device=device)
        with closing(encoder):
            return encoder.encode([encoder.negative_prompt if text is None else text for text in captions])

    try:
        return computed_once(encode, device=this_device(), group=group).float().transpose(0, 1)
    except ValueError as error:
        raise InputError(str(error)) from error


def encode_image(run: RunConfig, image: Image, *, group: ProcessGroup | None = None) -> tuple[Tensor, Tensor | None]:
    """What the network is given of an RGB picture, float32 on the CPU: its latent [C, T, H, W], and CLIP features [L, D] if it takes them.

    T is the run's, with grey after the picture; or 1 for a network that is given frames. Call on all ranks of `group` (default: all
    ranks): its first one loads the run's encoders one after the other and frees them. InputError on all of them where that fails.
    """
    model, device = run.model, this_device()

    def latent() -> Tensor:
        _, frames, height, width = run.latent.shape_CTHW
        with closing(build_video_encoder(run.encoders, channels=run.latent.channels, device=device)) as encoder:
            factor = encoder.spatial_factor
            _warn_if_stretched(image, height=factor * height, width=factor * width)
            pixels_CHW = image_pixels(image, height=factor * height, width=factor * width)
            return image_latent(encoder, pixels_CHW, frames=1 if model.conditional_frames else frames)

    def features() -> Tensor:
        with closing(build_image_encoder(run.encoders, model.image, device=device)) as encoder:
            return encoder.encode([image])[0]

    try:
        latent_CTHW = computed_once(latent, device=device, group=group)
        if model.image.dim is None:
            return latent_CTHW, None
        return latent_CTHW, computed_once(features, device=device, group=group)
    except ValueError as error:
        raise InputError(str(error)) from error


def _warn_if_stretched(image: Image, *, height: int, width: int) -> None:
    ratio = (image.width / image.height) / (width / height)
    if not 1 / _STRETCH < ratio < _STRETCH:
        log.warning("a picture of %d x %d is stretched to %d x %d; crop it first", *image.size, width, height)


def load_null_text(run: RunConfig) -> Tensor:
    """Embedding [L, 1, D] of the unconditional branch: from the configured file, or of the text encoder's negative prompt.

    Call on all ranks, before the networks take their memory.
    """
    path, model = run.data.negative_embedding, run.model
    if path is None:
        return encode_captions(run, [None])
    return load_caption_embedding(path, text_len=model.text_len, text_dim=model.text_dim)[:, None]


@contextmanager
def video_encoder(run: RunConfig, *, wanted: bool = True) -> Iterator[VideoEncoder | None]:
    """The run's video encoder on this rank, freed at the end; None where the run has none or it is not `wanted` here."""
    if run.encoders.video == "none" or not wanted:
        yield None
        return
    with closing(build_video_encoder(run.encoders, channels=run.latent.channels, device=this_device())) as encoder:
        yield encoder
