"""Decoding on a GPU, by NVIDIA DALI (NVDEC). DALI counts stored frames, so only videos that show each of them can go this way.

Shapes: C channels (RGB), T frames, H, W pixels.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np
import torch
from torch import Tensor

from rcm_megatron.data.video_frames import Shown, VideoError, VideoFacts

if TYPE_CHECKING:
    from nvidia.dali import Pipeline

logger = logging.getLogger(__name__)

_CODECS = ("av1", "h264", "hevc", "mpeg4", "vp9")
"""NVDEC's. Not VP8, whose frames for reference alone are packets like others."""
_LUMA = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722)}
"""Weights of red and blue (ITU-R BT.601 and BT.709)."""


def numbered_frames(path: Path, facts: VideoFacts) -> list[Shown] | None:
    """The frames in the order of their times, by number, without decoding; None if a decoder on the CPU has to say which are shown."""
    with av.open(f"file:{path}") as container:
        stream = container.streams.video[0]
        packets = [packet for packet in container.demux(stream) if packet.size]
        one, stored = float(stream.time_base), stream.frames
        stamps = [packet.pts for packet in packets]
        hidden = any(packet.is_discard for packet in packets) or None in stamps or len(set(stamps)) < len(stamps)
        whole = not stored or stored == len(packets)
        if hidden or not whole or container.format.name == "avi" or facts.codec not in _CODECS:
            logger.warning("%s is decoded on the CPU: its packets do not tell which frames are shown", path)
            return None
        durations = {packet.pts: packet.duration or 0 for packet in packets}
    first = min(stamps)
    return [Shown((pts - first) * one, durations[pts] * one, number) for number, pts in enumerate(sorted(stamps))]


class GPUDecoder:
    """DALI's pipeline for one device, made at the first video."""

    def __init__(self, device: torch.device) -> None:
        self._device = torch.cuda.current_device() if device.index is None else device.index
        self._pipeline: Pipeline | None = None

    def decode(
        self,
        path: Path,
        chosen: Sequence[int],
        facts: VideoFacts,
        *,
        box: tuple[float, float, float, float],
        size: tuple[int, int],
    ) -> Tensor:
        """RGB frames [T, H, W, C] in 0 to 255 (and a little beyond: a bicubic filter overshoots) of `size`, cut out of `box`.

        Raises VideoError for a video that is damaged.
        """
        pipeline = self._pipeline = self._pipeline or _build_pipeline(self._device)
        left, top, right, bottom = box
        feed = {"data": np.fromfile(path, np.uint8), "frames": np.array(chosen, np.int32)}
        feed |= {"start": np.float32([top, left]), "end": np.float32([bottom, right]), "size": np.float32(size)}
        for name, value in feed.items():
            pipeline.feed_input(name, [value])
        try:
            (clip_THWC,) = pipeline.run()
        except RuntimeError as error:
            self._pipeline = None  # it does not run again after an error
            reason = " ".join(str(error).partition("encountered:")[2].split())
            raise VideoError(f"cannot be decoded ({reason:.150}); restore or delete it") from error
        clip_THWC = torch.from_numpy(np.array(clip_THWC.as_cpu().at(0)))
        return clip_THWC @ from_bt601_to_bt709().T if facts.is_bt709 else clip_THWC


def from_bt601_to_bt709() -> Tensor:
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


def _build_pipeline(device: int | None) -> Pipeline:
    """`device` None: on the CPU, for tests of what is around the decoder."""
    from nvidia.dali import Pipeline, fn, types

    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=device, prefetch_queue_depth=1)
    with pipeline:
        data = fn.external_source(name="data", dtype=types.UINT8, ndim=1)
        frames = fn.external_source(name="frames", dtype=types.INT32, ndim=1)
        start, end, size = (
            fn.external_source(name=name, dtype=types.FLOAT, ndim=1) for name in ("start", "end", "size")
        )
        clip = fn.resize(
            fn.decoders.video(data, device="cpu" if device is None else "mixed", frames=frames),
            size=size,
            roi_start=start,
            roi_end=end,
            interp_type=types.INTERP_CUBIC,
            antialias=True,
            dtype=types.FLOAT,
        )
        pipeline.set_outputs(clip)
    pipeline.build()
    return pipeline
