"""Frames of a video file as a player shows them: numbered by when they come on screen, by PyAV (FFmpeg) on the CPU.

What is stored is not what is shown: edit lists hide frames at either end (trimmed MP4s), VP8 and AV1 have frames for reference alone, and
B-frames come in another order. A decoder's output knows; packets do not.

Shapes: T frames, H, W pixels, C channels (RGB).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.sidedata.sidedata import Type as SideData
from av.video.reformatter import Interpolation

from rcm_megatron.errors import InputError
from rcm_megatron.text import is_utf8

_ON_SCREEN = 1e-3
"""Seconds that a time stamp may be late: containers round them to milliseconds."""
_BT709 = 1
_BT601_LIKE = (2, 4, 5, 6)
"""FFmpeg's numbers: unspecified, FCC, BT.470BG and SMPTE 170M."""
_HDR = {16: "PQ", 18: "HLG"}
_TO_RGB = (
    Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP
)
"""Within one grey level of the exact conversion; FFmpeg's default is up to three off."""


class VideoError(InputError):
    """A video that gives no clip; the message says got, need and fix."""


class Shown(NamedTuple):
    """One frame as a player shows it."""

    time: float
    """When it comes on screen, in seconds since the first one."""
    seconds: float
    """How long it stays there; 0 if the file does not say."""
    frame: av.VideoFrame | int
    """The frame, or its number."""


@dataclass(frozen=True, kw_only=True)
class VideoFacts:
    """What the container and the first frame say about the picture."""

    codec: str
    height: int
    width: int
    """Of the stored frames."""
    is_bt709: bool = False
    pixel_aspect: float = 1.0
    """Width by height of a pixel of the stored frames."""
    transposed: bool = False
    """What makes a stored frame [H, W] the one that is shown: first swap its axes, then flip them."""
    flips: tuple[bool, bool] = (False, False)
    """Whether the (vertical, horizontal) axis is flipped."""


@contextmanager
def open_video(path: Path) -> Iterator[tuple[VideoFacts, Iterator[Shown]]]:
    """The facts of a video, and its frames in order, decoded as they are asked for. VideoError, also from within, if it is damaged."""
    if not is_utf8(str(path)):
        raise VideoError("its name is not UTF-8; rename it")
    try:
        with av.open(f"file:{path}") as container:
            frames = _decoded(container, stream := _stream(container))
            first = next(frames, None)
            if first is None:
                raise VideoError("got no frame, need some; restore or delete it")
            yield _facts(stream, first.frame), _from_zero(first, frames)
    except (av.FFmpegError, UnicodeDecodeError) as error:
        raise VideoError(f"cannot be read ({type(error).__name__}: {error}); restore or delete it") from error


def probe(path: Path) -> VideoFacts:
    """Read a video's first frame; VideoError if that is not possible, or it cannot be shown as it should."""
    with open_video(path) as (facts, _):
        return facts


def on_screen(shown: Iterable[Shown], *, frames: int, fps: float) -> Iterator[Shown]:
    """The frames on screen at 0, 1/fps, …, (frames - 1)/fps; VideoError if the video is too short or too slow."""
    wanted, given, gaps = np.arange(frames) / fps, 0, [0.0]
    last: Shown | None = None
    for each in shown:
        if last is not None:
            gaps.append(each.time - last.time)
            while given < frames and wanted[given] + _ON_SCREEN < each.time:
                yield _once(last, given, wanted, gaps[-1])
                given += 1
            if given == frames:
                return
        last = each
    seconds = last.seconds or float(np.median(gaps[1:] or gaps))
    end = last.time + max(seconds, 2 * _ON_SCREEN)
    if wanted[-1] + _ON_SCREEN >= end:
        need = f"{wanted[-1]:.2f} s for {frames} frames at {fps:g} a second"
        raise VideoError(f"got {last.time + seconds:.2f} s, need {need}; leave it out")
    while given < frames:
        yield _once(last, given, wanted, seconds)
        given += 1


def _once(frame: Shown, given: int, wanted: np.ndarray, seconds: float) -> Shown:
    """The frame for wanted time number `given`; VideoError if it was on screen at the one before too."""
    if given and frame.time <= wanted[given - 1] + _ON_SCREEN:
        raise VideoError(
            f"got a frame that stays for {seconds:.3f} s, need at most {wanted[1]:.3f} s (--fps {1 / wanted[1]:g}), or frames come twice; "
            "lower --fps"
        )
    return frame


def to_rgb(frame: av.VideoFrame, facts: VideoFacts) -> np.ndarray:
    """uint8 [H, W, 3] of a stored frame; VideoError if its size is not that of the first."""
    if (frame.height, frame.width) != (facts.height, facts.width):
        raise VideoError(
            f"got frames of {facts.height}x{facts.width} and {frame.height}x{frame.width}, need one size; re-encode it"
        )
    return frame.to_ndarray(format="rgb24", interpolation=_TO_RGB)


def orientation(matrix: bytes | None) -> tuple[bool, tuple[bool, bool]]:
    """(transposed, flips) of `VideoFacts` from a display matrix of nine 32-bit numbers (ISO 14496-12, 6.2.2).

    It maps (x, y) of the stored frame to (a x + c y, b x + d y) of what is shown. VideoError if that is no turn by 90 degrees or mirror.
    """
    if matrix is None:
        return False, (False, False)
    (a, b, u), (c, d, v), _ = np.frombuffer(matrix, np.int32).reshape(3, 3).tolist()
    little = max(abs(value) for value in (a, b, c, d)) / 1000
    straight, turned = max(abs(b), abs(c)) <= little, max(abs(a), abs(d)) <= little
    if not little:  # some writers leave it empty; players show the frame as it is
        return False, (False, False)
    if u or v or straight == turned or 0 in ((a, d) if straight else (b, c)):
        raise VideoError(
            f"is to be shown turned by the matrix {a, b, c, d}, need a multiple of 90 degrees; re-encode it upright"
        )
    return (False, (d < 0, a < 0)) if straight else (True, (b < 0, c < 0))


def _stream(container: av.container.InputContainer) -> av.VideoStream:
    """The video of a file, which may hold a cover picture beside it."""
    films = [
        stream for stream in container.streams.video if not stream.disposition & av.stream.Disposition.attached_pic
    ]
    if not films:
        raise VideoError("got no video stream, need one")
    films[0].thread_type = "AUTO"
    return films[0]


def _decoded(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[Shown]:
    """Frames with their times in the file."""
    one, last = float(stream.time_base), None
    ordered = container.format.name == "avi"  # its frames have no times and are shown one after the other
    for frame in container.decode(stream):
        if frame.is_corrupt:
            raise VideoError("cannot be decoded (a frame is damaged); restore or delete it")
        stamp = frame.dts if ordered else frame.pts
        if stamp is None and ordered and last is not None:  # the decoder's last ones
            stamp = round(last / one) + 1
        if stamp is None:
            raise VideoError("got frames without time stamps; put it into an MP4 file with ffmpeg -i, which adds them")
        if last is not None and stamp * one < last:
            raise VideoError(
                f"got time stamps that go back by {last - stamp * one:.2f} s, need ascending ones; re-encode it"
            )
        last = stamp * one
        yield Shown(last, frame.duration * one, frame)


def _from_zero(first: Shown, rest: Iterable[Shown]) -> Iterator[Shown]:
    yield first._replace(time=0.0)
    for each in rest:
        yield each._replace(time=each.time - first.time)


def _facts(stream: av.VideoStream, frame: av.VideoFrame) -> VideoFacts:
    if frame.color_trc in _HDR:
        raise VideoError(f"got HDR ({_HDR[frame.color_trc]}), need standard dynamic range; convert it")
    has_matrix = len(frame.format.components) >= 3 and not frame.format.is_rgb
    if has_matrix and frame.colorspace not in (_BT709, *_BT601_LIKE):
        raise VideoError(f"got colour space {frame.colorspace}, need BT.601 or BT.709; convert it")
    matrix = frame.side_data.get(SideData.DISPLAYMATRIX)
    transposed, flips = orientation(None if matrix is None else bytes(matrix))
    return VideoFacts(
        codec=stream.codec_context.codec.canonical_name,
        height=frame.height,
        width=frame.width,
        is_bt709=has_matrix and frame.colorspace == _BT709,
        pixel_aspect=float(stream.sample_aspect_ratio or 1),
        transposed=transposed,
        flips=flips,
    )
