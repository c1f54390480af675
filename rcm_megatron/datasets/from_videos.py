"""A dataset of raw videos: clips of one size, the VAE's latents, captions from the files beside them, image members if wanted.

Shapes: C channels, T frames, H, W, L text positions, D text width.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from rcm_megatron.config import RunConfig
from rcm_megatron.data.captions import CaptionError, read_caption
from rcm_megatron.data.manifest import DatasetError
from rcm_megatron.data.media import to_frames
from rcm_megatron.data.video import ENDINGS, ClipReader, VideoError, find_videos, probe
from rcm_megatron.datasets.build import Unit
from rcm_megatron.datasets.ranks import (
    Made,
    built_sample,
    encode_texts,
    make_units,
    open_build,
    report,
    text_facts,
)
from rcm_megatron.errors import InputError
from rcm_megatron.inference.conditioning import image_shapes
from rcm_megatron.inference.encoding import check_encoders, video_encoder
from rcm_megatron.inference.networks import init_parallel
from rcm_megatron.models.encoders import (
    CLIPImageEncoder,
    EncoderError,
    VideoEncoder,
    build_image_encoder,
    image_latent,
)
from rcm_megatron.models.encoders.wan_vae import latent_size
from rcm_megatron.platform.device import this_device
from rcm_megatron.requests import VideosRequest
from rcm_megatron.text import printable

VIDEOS_NAME = "videos.txt"
"""Line i names the video of key i."""
_UNIT_SIZE = 4


def build_from_videos(run: RunConfig, request: VideosRequest) -> None:
    """Encode a folder of captioned videos; every rank takes its share. InputError for what cannot be met, before weights load."""
    size = _clip_size(run, request)
    videos = _find_videos(request.videos)
    init_parallel(run)
    build, left = open_build(
        run,
        request,
        num_samples=len(videos),
        unit_size=_UNIT_SIZE,
        recipe=lambda: _recipe(request, videos, size),
    )
    if left:
        encode_texts(run, build, left, lambda unit: [_caption_or_empty(videos[index]) for index in unit.indices])
        if dist.get_rank() == 0:
            build.put_file(VIDEOS_NAME, "".join(f"{_name(request, path)}\n" for path in videos).encode())
        reader = ClipReader(**size, fps=request.fps, device=this_device())
        with video_encoder(run) as encoder, _image_encoder(run) as clip:
            maker = _Maker(run, request, videos, reader, encoder, clip)

            def make(unit: Unit) -> Made:
                return maker(unit, build.text(unit))

            make_units(build, left[dist.get_rank() :: dist.get_world_size()], make, writes=True)
    report(build)


@dataclass(frozen=True, eq=False)
class _Maker:
    """From a unit of videos and their captions' embeddings to its samples."""

    run: RunConfig
    request: VideosRequest
    videos: Sequence[Path]
    reader: ClipReader
    encoder: VideoEncoder
    clip: CLIPImageEncoder | None

    def __call__(self, unit: Unit, embed_BLD: Tensor) -> Made:
        samples, skipped = [], {}
        for index, embed_LD in zip(unit.indices, embed_BLD, strict=True):
            path = self.videos[index]
            try:
                caption, video_CTHW = read_caption(path), self.reader.read(path)
            except (VideoError, CaptionError) as error:
                skipped[index] = f"{_name(self.request, path)}: {error}"
                if self.request.on_error == "raise":
                    raise DatasetError(f"{skipped[index]} (--on-error skip leaves it out)") from error
                tqdm.write(f"left out: {skipped[index]}", file=sys.stderr)
                continue
            latent_CTHW = self.encoder.encode(video_CTHW[None])[0]
            image, text_len = self._image(video_CTHW), self.run.model.text_len
            samples.append(
                built_sample(self.request, index, latent_CTHW, embed_LD, caption, text_len=text_len, **image)
            )
        return samples, skipped

    def _image(self, video_CTHW: Tensor) -> dict[str, Tensor]:
        """What an image-to-video network is given, made of the clip's first frame."""
        members = {}
        if image_shapes(self.run)["image_latent_shape"] is not None:
            frames = self.run.latent.frames
            members["image_latent_CTHW"] = image_latent(self.encoder, video_CTHW[:, 0], frames=frames)
        if self.clip is not None:
            from PIL import Image

            first_HWC = to_frames(video_CTHW[:, :1], scale=1)[0]
            members["image_embed_LD"] = self.clip.encode([Image.fromarray(first_HWC)])[0]
        return members


@contextmanager
def _image_encoder(run: RunConfig) -> Iterator[CLIPImageEncoder | None]:
    """CLIP, where the network attends to an image's features; freed at the end."""
    if image_shapes(run)["image_embed_shape"] is None:
        yield None
        return
    with closing(build_image_encoder(run.encoders, run.model.image, device=this_device())) as encoder:
        yield encoder


def _clip_size(run: RunConfig, request: VideosRequest) -> dict[str, int]:
    """Frames and pixels of the clips; InputError where they do not give the latents of the configuration, or an encoder lacks."""
    _check_encoders(run)
    time, space = 1, 1
    if run.encoders.video == "wan_vae":
        config = json.loads((Path(run.encoders.folder) / "vae" / "config.json").read_text())
        time, space = config["scale_factor_temporal"], config["scale_factor_spatial"]
    latent = run.latent
    frames = request.frames or (latent.frames - 1) * time + 1
    height, width = request.size or (latent.height * space, latent.width * space)
    asked = f"--frames {frames} --size {height}x{width}"
    try:
        got = latent_size(frames, height, width, time=time, space=space)
    except EncoderError as error:
        raise InputError(f"{asked}: {error}") from error
    if got != (need := (latent.frames, latent.height, latent.width)):
        raise InputError(
            f"{asked}: got latents of {got} frames, rows and columns, need {need}; leave both options out, or change latent.frames, "
            "latent.height and latent.width of the configuration"
        )
    if request.fps <= 0:
        raise InputError(f"got --fps {request.fps}, need more than 0")
    return {"frames": frames, "height": height, "width": width}


def _check_encoders(run: RunConfig) -> None:
    check_encoders(run)
    encoders = run.encoders
    if encoders.video == "none":
        raise InputError("got encoders.video=none, need a video encoder; set it to wan_vae and encoders.folder")
    if encoders.video == "pixels" and run.latent.channels != 3:
        raise InputError(
            f"got encoders.video=pixels with latent.channels={run.latent.channels}, need 3 for videos in colour"
        )
    if encoders.text == "none":
        raise InputError("got encoders.text=none, need a text encoder for the captions; set it to umt5 or t5")
    if image_shapes(run)["image_embed_shape"] is not None and encoders.image == "none":
        raise InputError("got encoders.image=none, need the image encoder of this network; set it to clip")


def _find_videos(folder: Path) -> list[Path]:
    """The videos; InputError if there are none, or none of them can be used."""
    videos, reason = find_videos(folder), ""
    if not videos:
        raise InputError(f"got --videos {folder} without a video, need files that end in {', '.join(ENDINGS)}")
    for path in videos:
        try:
            probe(path)
            read_caption(path)
            return videos
        except (VideoError, CaptionError) as error:
            reason = reason or f"{printable(path.name)}: {error}"
    raise InputError(f"none of the {len(videos)} videos of {folder} can be used; the first, {reason}")


def _recipe(request: VideosRequest, videos: Sequence[Path], size: dict[str, int]) -> dict[str, object]:
    return {
        "source": "videos",
        **size,
        "fps": request.fps,
        "on_error": request.on_error,
        "videos": text_facts([f"{_name(request, path)} {_size(path)}" for path in videos]),
        "prompts": text_facts([_caption_or_empty(path) for path in videos]),
        "decoder": {name: version(name) for name in ("av", "pillow")},
    }


def _name(request: VideosRequest, video: Path) -> str:
    return printable(str(video.relative_to(request.videos)))


def _size(video: Path) -> int:
    """In bytes; -1 for a broken link, which is named when its turn comes."""
    try:
        return video.stat().st_size
    except OSError:
        return -1


def _caption_or_empty(video: Path) -> str:
    """A video whose caption cannot be read is named when its turn comes."""
    try:
        return read_caption(video)
    except CaptionError:
        return ""
