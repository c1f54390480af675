"""Raw videos to clips of one length, size and frame rate: NVIDIA DALI decodes, crops and resizes; PyAV reads time stamps.

Shapes: C channels (RGB), T frames, H, W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np
import torch
from torch import Tensor

from rcm_megatron.errors import UserError

if TYPE_CHECKING:
    from nvidia.dali import Pipeline

ENDINGS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")
CPU_CODECS = ("mjpeg", "vp8", "vp9")
"""What DALI 2.4's own FFmpeg decodes; NVDEC, on a GPU, adds the rest."""
GPU_CODECS = (*CPU_CODECS, "av1", "h264", "hevc", "mpeg4")

_ON_SCREEN = 1e-3
"""Seconds that a time stamp may be late: containers round them to milliseconds."""
_BT709 = 1
_BT601_LIKE = (2, 4, 5, 6)
"""FFmpeg's numbers: unspecified, FCC, BT.470BG and SMPTE 170M."""
_LUMA = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722)}
"""Weights of red and blue (ITU-R BT.601 and BT.709)."""


class VideoError(UserError, ValueError):
    """A video that gives no clip; the message says got, need and fix."""


@dataclass(frozen=True, kw_only=True, eq=False)
class VideoFacts:
    """What the container says, and the first frame."""

    codec: str
    height: int
    width: int
    is_bt709: bool
    times: np.ndarray
    """When each frame comes on screen, in seconds since the first; ascending."""

    @property
    def frame_seconds(self) -> float:
        """How long one frame is shown."""
        return float(np.median(np.diff(self.times))) if len(self.times) > 1 else 0.0


def find_videos(folder: Path) -> list[Path]:
    """All videos of a folder and its subfolders, in the order of their names."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS and path.is_file())


def probe(path: Path) -> VideoFacts:
    """Read a video's packets and its first frame; VideoError if that is not possible, or DALI would show it wrongly."""
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise VideoError("got no video stream, need one")
            stream = container.streams.video[0]
            stamps = sorted(packet.pts for packet in container.demux(stream) if packet.pts is not None)
            container.seek(0)
            frame = next(container.decode(stream))
            # of the stream itself only while it is open
            codec, time_base = stream.codec_context.codec.canonical_name, float(stream.time_base)
    except (av.FFmpegError, StopIteration) as error:
        raise VideoError(f"cannot be read ({type(error).__name__}: {error}); restore or delete it") from error
    if frame.rotation:
        raise VideoError(f"is to be shown rotated by {frame.rotation} degrees; re-encode it upright with ffmpeg -i")
    if frame.colorspace not in (_BT709, *_BT601_LIKE):
        raise VideoError(f"got colour space {frame.colorspace}, need BT.601 or BT.709; convert it")
    if not stamps:
        raise VideoError("got packets without time stamps; put it into an MP4 file with ffmpeg -i, which adds them")
    times = (np.array(stamps) - stamps[0]) * time_base
    return VideoFacts(
        codec=codec,
        height=frame.height,
        width=frame.width,
        is_bt709=frame.colorspace == _BT709,
        times=times,
    )


def check_codec(codec: str, *, on_gpu: bool) -> None:
    """VideoError for a codec that DALI cannot decode there."""
    if codec not in (GPU_CODECS if on_gpu else CPU_CODECS):
        fix = "re-encode it, e.g. with ffmpeg -c:v libvpx-vp9"
        if not on_gpu and codec in GPU_CODECS:
            fix = f"build on a GPU, or {fix}"
        where, known = ("a GPU", GPU_CODECS) if on_gpu else ("the CPU", CPU_CODECS)
        raise VideoError(f"got codec {codec}, need one that DALI decodes on {where} ({', '.join(known)}); {fix}")


def choose_frames(facts: VideoFacts, *, frames: int, fps: float) -> np.ndarray:
    """Numbers of the frames on screen at 0, 1/fps, …, (frames - 1)/fps; VideoError if the video is too short or too slow."""
    last, shown = float(facts.times[-1]), facts.frame_seconds
    wanted = np.arange(frames) / fps
    if wanted[-1] >= last + max(shown, _ON_SCREEN):
        raise VideoError(
            f"got {last + shown:.2f} s, need {wanted[-1]:.2f} s for {frames} frames at {fps:g} a second; leave it out"
        )
    chosen = np.searchsorted(facts.times, wanted + _ON_SCREEN, side="right") - 1
    if len(np.unique(chosen)) < frames:
        raise VideoError(
            f"got {1 / shown if shown else 0:.2f} frames a second, need at least --fps {fps:g}, or frames come twice"
        )
    return chosen.astype(np.int32)


def crop_box(facts: VideoFacts, *, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The largest centred box of the wanted shape: its (top, left) and (bottom, right), in pixels, not rounded."""
    scale = min(facts.height / height, facts.width / width)
    size = np.array([height * scale, width * scale])
    start = (np.array([facts.height, facts.width]) - size) / 2
    return start.astype(np.float32), (start + size).astype(np.float32)


class ClipReader:
    """Clips [C, T, H, W] of one shape, float32 in [-1, 1], from the beginning of videos of any size and frame rate.

    The largest centred crop, resized with an antialiasing bicubic filter (Pillow's, to one grey level of 255).
    """

    def __init__(self, *, frames: int, height: int, width: int, fps: float, device: torch.device) -> None:
        self.frames, self.height, self.width, self.fps = frames, height, width, fps
        self._device = device
        self._pipeline: Pipeline | None = None

    def read(self, path: Path) -> Tensor:
        """The clip of one video, on the CPU; VideoError if it gives none."""
        facts = probe(path)
        check_codec(facts.codec, on_gpu=self._device.type == "cuda")
        chosen = choose_frames(facts, frames=self.frames, fps=self.fps)
        clip_TCHW = self._decode(path, chosen, *crop_box(facts, height=self.height, width=self.width))
        if facts.is_bt709:
            clip_TCHW = torch.einsum("dc,tchw->tdhw", _from_bt601_to_bt709(), clip_TCHW)
        return clip_TCHW.div(127.5).sub(1).clamp(-1, 1).movedim(0, 1).contiguous()

    def _decode(self, path: Path, chosen: np.ndarray, start: np.ndarray, end: np.ndarray) -> Tensor:
        """RGB frames [T, C, H, W] in 0 to 255 (and a little beyond: a bicubic filter overshoots)."""
        pipeline = self._pipeline = self._pipeline or _build_pipeline(self.height, self.width, self._device)
        for name, value in (("data", np.fromfile(path, np.uint8)), ("frames", chosen), ("start", start), ("end", end)):
            pipeline.feed_input(name, [value])
        try:
            (clip_THWC,) = pipeline.run()
        except RuntimeError as error:
            self._pipeline = None  # it does not run again after an error
            reason = " ".join(str(error).partition("encountered:")[2].split())
            raise VideoError(f"cannot be decoded ({reason:.150}); restore or delete it") from error
        clip_THWC = clip_THWC.as_cpu() if self._device.type == "cuda" else clip_THWC
        return torch.from_numpy(np.array(clip_THWC.at(0))).movedim(-1, 1)


def _from_bt601_to_bt709() -> Tensor:
    """[3, 3]: DALI takes every video for BT.601, whatever its tag says; this undoes it and applies BT.709."""
    return torch.tensor(_to_rgb(*_LUMA["bt709"]) @ np.linalg.inv(_to_rgb(*_LUMA["bt601"])), dtype=torch.float32)


def _to_rgb(red: float, blue: float) -> np.ndarray:
    """(R, G, B) of (Y, Cb, Cr), Cb and Cr around zero."""
    green = 1 - red - blue
    return np.array(
        [
            [1, 0, 2 * (1 - red)],
            [1, -2 * blue * (1 - blue) / green, -2 * red * (1 - red) / green],
            [1, 2 * (1 - blue), 0],
        ]
    )


def _build_pipeline(height: int, width: int, device: torch.device) -> Pipeline:
    from nvidia.dali import Pipeline, fn, types

    on_gpu = device.type == "cuda"
    device_id = (torch.cuda.current_device() if device.index is None else device.index) if on_gpu else None
    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=device_id, prefetch_queue_depth=1)
    with pipeline:
        data = fn.external_source(name="data", dtype=types.UINT8, ndim=1)
        frames = fn.external_source(name="frames", dtype=types.INT32, ndim=1)
        start, end = (fn.external_source(name=name, dtype=types.FLOAT, ndim=1) for name in ("start", "end"))
        video = fn.decoders.video(data, device="mixed" if on_gpu else "cpu", frames=frames)
        clip = fn.resize(
            video,
            size=[height, width],
            roi_start=start,
            roi_end=end,
            interp_type=types.INTERP_CUBIC,
            antialias=True,
            dtype=types.FLOAT,
        )
        pipeline.set_outputs(clip)
    pipeline.build()
    return pipeline
