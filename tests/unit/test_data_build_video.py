"""Clips from raw videos: crop and resize against Pillow, colours, and videos that give none. Which frames: test_data_video_frames.py."""

import numpy as np
import pytest
import torch

from rcm_megatron.data.video import ClipReader, VideoError, probe
from tests.videos import read_mp4, smooth_frames, write_video

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("videos") / "waves.mp4", smooth_frames())


def reader(**changes):
    return ClipReader(**({"frames": 5, "height": 24, "width": 32, "fps": 8.0, "device": CPU} | changes))


@pytest.mark.parametrize(("height", "width"), [(24, 32), (40, 24), (56, 88)], ids=["wide", "tall", "larger"])
def test_a_clip_is_pillows_crop_and_resize_of_the_frames_at_the_wanted_times(video, height, width):
    """At 24 frames a second, 8 a second are every third. FFmpeg's RGB with its usual flags is some grey levels off."""
    from PIL import Image

    clip_CTHW = reader(height=height, width=width).read(video)
    assert clip_CTHW.shape == (3, 5, height, width) and clip_CTHW.dtype == torch.float32
    scale = min(48 / height, 80 / width)
    left, top = (80 - width * scale) / 2, (48 - height * scale) / 2
    frames = [Image.fromarray(frame) for frame in read_mp4(video)[[0, 3, 6, 9, 12]]]
    box = (left, top, 80 - left, 48 - top)
    expected = np.stack([frame.resize((width, height), Image.Resampling.BICUBIC, box=box) for frame in frames])
    error = np.abs((clip_CTHW.movedim(0, -1).numpy() + 1) * 127.5 - expected)
    assert error.max() <= 8 and error.mean() < 2, f"grey levels: largest {error.max():.1f}, mean {error.mean():.2f}"


def test_the_resize_alone_is_pillows(video):
    from PIL import Image

    whole = reader(height=48, width=80).read(video)
    small = reader(height=20, width=28).read(video)
    frames = ((whole.movedim(0, -1) + 1) * 127.5).round().byte().numpy()
    left = (80 - 28 * 2.4) / 2
    for time, frame_HWC in enumerate(frames):
        expected = Image.fromarray(frame_HWC).resize((28, 20), Image.Resampling.BICUBIC, box=(left, 0, 80 - left, 48))
        error = np.abs((small[:, time].movedim(0, -1).numpy() + 1) * 127.5 - np.asarray(expected))
        assert error.max() <= 1e-3, f"frame {time}: {error.max():.2f}"


FORMATS = {
    "limited": ("libvpx-vp9", "yuv420p", 1),
    "full": ("libx264", "yuv420p", 2),
    "10 bit": ("libx264", "yuv420p10le", 1),
}


@pytest.mark.parametrize("colorspace", [1, 5], ids=["bt709", "bt601"])
@pytest.mark.parametrize("kind", FORMATS)
def test_colours_follow_the_tags(tmp_path, colorspace, kind):
    import av

    codec, pixels, color_range = FORMATS[kind]
    colour = np.array([200, 60, 90], dtype=np.uint8)
    red, blue = {1: (0.2126, 0.0722), 5: (0.299, 0.114)}[colorspace]
    luma = (np.array([red, 1 - red - blue, blue]) * colour / 255).sum()
    chroma = [(colour[2] / 255 - luma) / (2 - 2 * blue), (colour[0] / 255 - luma) / (2 - 2 * red)]
    scale = [(16, 219), (128, 224)] if color_range == 1 else [(0, 255), (128, 255)]
    levels = [
        start + size * value
        for (start, size), value in zip([scale[0], scale[1], scale[1]], [luma, *chroma], strict=True)
    ]
    deep = "10" in pixels
    with av.open(str(tmp_path / "flat.mp4"), "w") as container:
        stream = container.add_stream(codec, rate=24)
        stream.height, stream.width, stream.pix_fmt = 32, 48, pixels
        stream.options = {"crf": "4"}
        stream.codec_context.colorspace, stream.codec_context.color_range = colorspace, color_range
        for _ in range(8):
            frame = av.VideoFrame(48, 32, pixels)
            frame.colorspace, frame.color_range = colorspace, color_range
            for plane, level in zip(frame.planes, levels, strict=True):
                width = np.uint16 if deep else np.uint8
                plane.update(
                    np.full(plane.buffer_size // width().nbytes, round(level * (4 if deep else 1)), width).tobytes()
                )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert probe(tmp_path / "flat.mp4").is_bt709 == (colorspace == 1)
    clip_CTHW = reader(frames=2).read(tmp_path / "flat.mp4")
    error = ((clip_CTHW + 1) * 127.5 - torch.from_numpy(colour).view(3, 1, 1, 1)).abs().max()
    assert error <= 3, f"{error:.1f} grey levels"


@pytest.mark.parametrize(
    ("codec", "ending"),
    [("libvpx", "webm"), ("mjpeg", "avi"), ("libx264", "mp4"), ("libx265", "mkv"), ("mpeg4", "mov")],
)
def test_codecs_are_decoded_on_the_cpu(tmp_path, codec, ending):
    write = write_mjpeg if codec == "mjpeg" else write_video
    path = write(tmp_path / f"a.{ending}", smooth_frames(8), **({} if codec == "mjpeg" else {"codec": codec}))
    clip_CTHW = reader(frames=8, height=48, width=80, fps=24.0).read(path)
    expected = torch.from_numpy(read_mp4(path)).movedim(-1, 0).float()
    assert ((clip_CTHW + 1) * 127.5 - expected).abs().mean() < 3


def write_mjpeg(path, frames_THWC):
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=24)
        stream.height, stream.width, stream.pix_fmt = *frames_THWC.shape[1:3], "yuvj420p"
        for frame_HWC in frames_THWC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame_HWC, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_videos_that_cannot_be_used(tmp_path, video):
    (tmp_path / "cut.mp4").write_bytes(video.read_bytes()[:600])
    (tmp_path / "text.mp4").write_text("no video")
    for name, message in {
        "cut": "cannot be read",
        "text": "cannot be read",
    }.items():
        with pytest.raises(VideoError, match=message):
            probe(tmp_path / f"{name}.mp4")


def test_a_reader_goes_on_after_a_damaged_video(tmp_path, video):
    """Bytes in the middle overwritten: the container is whole, the decoder refuses."""
    data = bytearray(video.read_bytes())
    start, end = data.index(b"mdat") + 400, data.index(b"moov") - 100
    assert end > start + 400
    data[start:end] = b"\xff" * (end - start)
    (tmp_path / "damaged.mp4").write_bytes(data)
    clips = reader()
    before = clips.read(video)
    with pytest.raises(VideoError, match="cannot be (decoded|read)"):
        clips.read(tmp_path / "damaged.mp4")
    assert torch.equal(clips.read(video), before)
