"""Clips from raw videos: decoding, choice of frames, crop and resize against Pillow and PyAV, and videos that give none."""

import numpy as np
import pytest
import torch

from rcm_megatron.data.media import read_mp4
from rcm_megatron.data.video import (
    ClipReader,
    VideoError,
    VideoFacts,
    check_codec,
    choose_frames,
    crop_box,
    find_videos,
    probe,
)
from tests.videos import smooth_frames, write_rotated, write_video

CPU = torch.device("cpu")


def facts(times, *, height=40, width=60):
    return VideoFacts(codec="vp9", height=height, width=width, is_bt709=False, times=np.array(times, dtype=float))


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("videos") / "waves.mp4", smooth_frames())


def reader(**changes):
    return ClipReader(**({"frames": 5, "height": 24, "width": 32, "fps": 8.0, "device": CPU} | changes))


@pytest.mark.parametrize(("height", "width"), [(24, 32), (40, 24), (56, 88)], ids=["wide", "tall", "larger"])
def test_a_clip_is_pillows_crop_and_resize_of_the_frames_at_the_wanted_times(video, height, width):
    """At 24 frames a second, 8 a second are every third. FFmpeg's RGB, by itself, is 2 grey levels off that of flat colours."""
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


def test_the_resize_alone_is_pillows_to_one_grey_level(video):
    """On DALI's own frames, so that the decoders' conversions to RGB do not matter."""
    from PIL import Image

    whole = reader(height=48, width=80).read(video)
    small = reader(height=20, width=28).read(video)
    frames = ((whole.movedim(0, -1) + 1) * 127.5).round().byte().numpy()
    left = (80 - 28 * 2.4) / 2
    for time, frame_HWC in enumerate(frames):
        expected = Image.fromarray(frame_HWC).resize((28, 20), Image.Resampling.BICUBIC, box=(left, 0, 80 - left, 48))
        error = np.abs((small[:, time].movedim(0, -1).numpy() + 1) * 127.5 - np.asarray(expected))
        assert error.max() <= 1.05, f"frame {time}: {error.max():.2f}"


@pytest.mark.parametrize("colorspace", [1, 5], ids=["bt709", "bt601"])
def test_colours_follow_the_tag(tmp_path, colorspace):
    colour = np.array([200, 60, 90], dtype=np.uint8)
    path = write_video(tmp_path / "flat.mp4", np.broadcast_to(colour, (8, 32, 48, 3)), colorspace=colorspace)
    assert probe(path).is_bt709 == (colorspace == 1)
    clip_CTHW = reader(frames=2).read(path)
    error = ((clip_CTHW + 1) * 127.5 - torch.from_numpy(colour).view(3, 1, 1, 1)).abs().max()
    assert error <= 3, f"{error:.1f} grey levels"


def test_frames_are_those_on_screen():
    steady = facts(np.arange(10) / 10)
    assert choose_frames(steady, frames=4, fps=10.0).tolist() == [0, 1, 2, 3]
    assert choose_frames(steady, frames=4, fps=4.0).tolist() == [0, 2, 5, 7]
    rounded = facts(np.round(np.arange(10) / 30, 3))  # to milliseconds, as WebM has them
    assert choose_frames(rounded, frames=5, fps=15.0).tolist() == [0, 2, 4, 6, 8]
    uneven = facts([0, 0.05, 0.5, 0.55, 0.9])
    assert choose_frames(uneven, frames=3, fps=2.5).tolist() == [0, 1, 3]
    assert choose_frames(facts([0.0]), frames=1, fps=16.0).tolist() == [0]


def test_uneven_time_stamps_are_read(tmp_path):
    path = write_video(tmp_path / "uneven.mp4", smooth_frames(6), stamps=[0, 1, 2, 12, 13, 24])
    assert probe(path).times == pytest.approx(np.array([0, 1, 2, 12, 13, 24]) / 24, abs=2e-3)
    clip_CTHW = reader(frames=3, height=48, width=80, fps=2.0).read(path)
    expected = torch.from_numpy(read_mp4(path)[[0, 3, 5]]).movedim(-1, 0).float()
    assert ((clip_CTHW + 1) * 127.5 - expected).abs().mean() < 2


@pytest.mark.parametrize(
    ("times", "frames", "fps", "message"),
    [
        ([0, 0.1, 0.2], 5, 10.0, "got 0.30 s, need 0.40 s for 5 frames at 10 a second"),
        ([0, 0.1, 0.2, 0.3, 0.4], 5, 20.0, "got 10.00 frames a second, need at least --fps 20"),
        ([0.0], 2, 16.0, "got 0.00 s"),
    ],
)
def test_short_and_slow_videos_are_refused(times, frames, fps, message):
    with pytest.raises(VideoError, match=message):
        choose_frames(facts(times), frames=frames, fps=fps)


def test_the_crop_is_the_largest_centred_one():
    start, end = crop_box(facts([0], height=100, width=300), height=20, width=30)
    assert start.tolist() == [0, 75] and end.tolist() == [100, 225]
    start, end = crop_box(facts([0], height=101, width=30), height=20, width=30)
    assert start.tolist() == [40.5, 0] and end.tolist() == [60.5, 30]


def test_codecs_that_dali_lacks_are_named(tmp_path):
    path = write_video(tmp_path / "h264.mp4", smooth_frames(8), codec="libx264")
    with pytest.raises(VideoError, match=r"got codec h264, need .* the CPU \(mjpeg, vp8, vp9\); build on a GPU, or"):
        reader(frames=2).read(path)
    check_codec("h264", on_gpu=True)
    with pytest.raises(VideoError, match=r"got codec prores, need .* a GPU .*hevc.*; re-encode it"):
        check_codec("prores", on_gpu=True)


@pytest.mark.parametrize(("codec", "ending"), [("libvpx", "webm"), ("mjpeg", "avi")])
def test_the_other_codecs_of_the_cpu(tmp_path, codec, ending):
    path = write_video(tmp_path / f"a.{ending}", smooth_frames(8), codec=codec) if codec != "mjpeg" else None
    path = path or write_mjpeg(tmp_path / f"a.{ending}", smooth_frames(8))
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
    write_rotated(tmp_path / "turned.mp4", video)
    (tmp_path / "cut.mp4").write_bytes(video.read_bytes()[:600])
    (tmp_path / "text.mp4").write_text("no video")
    for name, message in {
        "turned": "rotated by -?90 degrees",
        "cut": "cannot be read",
        "text": "cannot be read",
    }.items():
        with pytest.raises(VideoError, match=message):
            probe(tmp_path / f"{name}.mp4")


def test_a_reader_goes_on_after_a_damaged_video(tmp_path, video):
    """Bytes in the middle overwritten: the container is whole, DALI's decoder refuses."""
    data = bytearray(video.read_bytes())
    start, end = data.index(b"mdat") + 400, data.index(b"moov") - 100
    assert end > start + 400
    data[start:end] = b"\xff" * (end - start)
    (tmp_path / "damaged.mp4").write_bytes(data)
    clips = reader()
    before = clips.read(video)
    with pytest.raises(VideoError, match="cannot be decoded .*(decode|frame)"):
        clips.read(tmp_path / "damaged.mp4")
    assert torch.equal(clips.read(video), before)


def test_videos_are_found_in_order(tmp_path):
    for name in ("b.mp4", "a.WEBM", "c/a.mkv", "a.txt", "d.gif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert [str(path.relative_to(tmp_path)) for path in find_videos(tmp_path)] == ["a.WEBM", "b.mp4", "c/a.mkv"]
