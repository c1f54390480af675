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


def write_rotated(path, source):
    """The MP4 file `source` with the note that it is to be shown turned by 90 degrees, in the header of its track."""
    matrix = {
        angle: b"".join(value.to_bytes(4, "big", signed=True) for value in values)
        for angle, values in {
            0: (0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000),
            90: (0, 0x10000, 0, -0x10000, 0, 0, 0, 0, 0x40000000),
        }.items()
    }
    data = Path(source).read_bytes()
    start = data.index(matrix[0], data.index(b"tkhd"))
    Path(path).write_bytes(data[:start] + matrix[90] + data[start + len(matrix[0]) :])
    return Path(path)
