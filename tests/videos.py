"""Small videos for tests: VP9 in MP4 files, which DALI decodes on the CPU too."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def smooth_frames(frames=24, height=48, width=80, *, seed=0):
    """uint8 RGB [T, H, W, 3] of slow waves: chroma at half resolution and a lossy codec change them little."""
    y, x = np.mgrid[:height, :width]
    phase = np.random.default_rng(seed).uniform(0, 6, size=3)
    waves = [
        [128 + 90 * np.sin(x / 40 + y / 30 + phase[channel] + 0.2 * time) for channel in range(3)]
        for time in range(frames)
    ]
    return np.array(waves).round().astype(np.uint8).transpose(0, 2, 3, 1)


def write_video(path, frames_THWC, *, rate=24, codec="libvpx-vp9", colorspace=None, stamps=None):
    """One video file; `colorspace`: FFmpeg's number of the matrix it is converted with and tagged (1: BT.709).

    `stamps`: when each frame comes, in units of 1/rate, if not one after the other.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = *frames_THWC.shape[1:3], "yuv420p"
        if codec == "libvpx-vp9":
            stream.options = {"crf": "4", "b:v": "0", "cpu-used": "8", "lag-in-frames": "0"}
        if colorspace is not None:
            stream.codec_context.colorspace = colorspace
        for number, frame_HWC in enumerate(frames_THWC):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), format="rgb24")
            if colorspace is not None:
                frame = frame.reformat(format="yuv420p", dst_colorspace=colorspace)
                frame.colorspace = colorspace
            if stamps is not None:
                frame.pts, frame.time_base = stamps[number], Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


MATRICES = {
    "turned by 90": (0, 1, -1, 0),
    "turned by 180": (-1, 0, 0, -1),
    "turned by 270": (0, -1, 1, 0),
    "mirrored": (-1, 0, 0, 1),
    "upside down": (1, 0, 0, -1),
    "transposed": (0, 1, 1, 0),
    "transposed, turned by 180": (0, -1, -1, 0),
    "turned by 30": (0.866, 0.5, -0.5, 0.866),
}
"""(a, b, c, d) of display matrices: (x, y) is shown at (a x + c y, b x + d y)."""


def with_matrix(path, source, matrix):
    """The MP4 file `source` with a display matrix (a, b, c, d) in the header of its track."""

    def words(a, b, c, d):
        values = (
            *(round(value * 0x10000) for value in (a, b)),
            0,
            *(round(value * 0x10000) for value in (c, d)),
            0,
            0,
            0,
            1 << 30,
        )
        return b"".join(value.to_bytes(4, "big", signed=True) for value in values)

    data, plain = Path(source).read_bytes(), words(1, 0, 0, 1)
    start = data.index(plain, data.index(b"tkhd"))
    Path(path).write_bytes(data[:start] + words(*matrix) + data[start + len(plain) :])
    return Path(path)


def write_rotated(path, source):
    """The MP4 file `source` with a phone's note that it is to be shown turned by 90 degrees."""
    return with_matrix(path, source, MATRICES["turned by 90"])


def grey_video(path, stamps, *, codec="libvpx-vp9", options=None, size=(48, 80), aspect=None, rate=1000):
    """A video whose frame number i is grey level 30 + 4 i all over, at stamps[i] / `rate` seconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=24 if rate == 1000 else rate)
        stream.height, stream.width, stream.pix_fmt, stream.gop_size = *size, "yuv420p", 100
        stream.options = options or {}
        stream.codec_context.time_base = Fraction(1, rate)
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        for number, stamp in enumerate(stamps):
            frame = av.VideoFrame.from_ndarray(np.full((*size, 3), 30 + 4 * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = stamp, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return Path(path)


def remuxed(path, source, *, cut=0.0, keep=None):
    """The packets of `source` in another container, `cut` seconds earlier; `keep`: the (pts, packet) that stay, by a function."""
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = old.streams.video[0]
        target = new.add_stream_from_template(stream)
        for packet in old.demux(stream):
            if packet.dts is None or (keep is not None and not keep(packet)):
                continue
            shift = round(cut / float(packet.time_base))
            packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, target
            new.mux(packet)
    return Path(path)


def read_mp4(path):
    """All frames of a video file, uint8 RGB [T, H, W, 3]."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
