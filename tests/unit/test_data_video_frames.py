"""Clips show what a player shows: frames by the time at which they come on screen, upright, in their proportions; or the video is named."""

from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from rcm_megatron.data.video import ClipReader, VideoError, crop_box, find_videos, probe
from rcm_megatron.data.video_frames import Shown, VideoFacts, on_screen, orientation
from rcm_megatron.data.video_gpu import from_bt601_to_bt709, numbered_frames
from tests.videos import MATRICES, grey_video, remuxed, smooth_frames, with_matrix, write_rotated, write_video

CPU = torch.device("cpu")
B_FRAMES = {"x264-params": "bframes=3:b-adapt=0:b-pyramid=normal"}
HIDDEN = {"auto-alt-ref": "1", "lag-in-frames": "12", "arnr-maxframes": "5", "b:v": "200k", "deadline": "good"}


def numbers(path, *, frames, fps):
    """Numbers of the frames that a clip of `grey_video` holds."""
    clip_CTHW = ClipReader(frames=frames, height=48, width=80, fps=fps, device=CPU).read(path)
    levels = ((clip_CTHW + 1) * 127.5).mean((0, 2, 3))
    return ((levels - 30) / 4).round().int().tolist()


def even(count, rate=24):
    return [round(1000 * number / rate) for number in range(count)]


KINDS = {
    "h264.mp4": ("libx264", {}),
    "h264 with B-frames.mp4": ("libx264", B_FRAMES),
    "h264 with B-frames.mkv": ("libx264", B_FRAMES),
    "h264 with B-frames.mov": ("libx264", B_FRAMES),
    "h264 with B-frames.ts": ("libx264", B_FRAMES),
    "h264 with open GOPs.mp4": ("libx264", {"x264-params": "bframes=2:open-gop=1:keyint=8:min-keyint=1"}),
    "hevc.mp4": ("libx265", {"x265-params": "log-level=0"}),
    "hevc.mkv": ("libx265", {"x265-params": "log-level=0:bframes=4"}),
    "av1.mp4": ("libsvtav1", {"preset": "11"}),
    "av1.webm": ("libsvtav1", {"preset": "11"}),
    "vp8.webm": ("libvpx", HIDDEN),
    "vp9.webm": ("libvpx-vp9", HIDDEN | {"cpu-used": "8"}),
    "vp9.mp4": ("libvpx-vp9", HIDDEN | {"cpu-used": "8"}),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_second_frame_of_every_codec(tmp_path, name):
    codec, options = KINDS[name]
    path = grey_video(tmp_path / name, even(30), codec=codec, options=options)
    assert numbers(path, frames=15, fps=12.0) == list(range(0, 30, 2))
    with pytest.raises(VideoError, match="got 1.2. s, need 1.25 s for 16 frames at 12 a second"):
        numbers(path, frames=16, fps=12.0)


@pytest.mark.parametrize(
    ("codec", "options"), [("libx264", B_FRAMES), ("mpeg4", {"bf": "2", "qmax": "2"}), ("mpeg4", {"qmax": "2"})]
)
def test_avi_files_show_their_frames_one_after_the_other(tmp_path, codec, options):
    """They have no presentation times; with B-frames, FFmpeg's guesses at them are out of order."""
    path = grey_video(tmp_path / "a.avi", range(30), codec=codec, options=options, rate=24)
    got = numbers(path, frames=14, fps=12.0)
    off = np.abs(np.array(got) - np.arange(0, 28, 2)).max()
    assert off <= (codec == "mpeg4"), got  # whose grey levels may be one off
    with pytest.raises(VideoError, match=r"got 1\.2. s"):
        numbers(path, frames=16, fps=12.0)


def test_frames_for_reference_alone_are_not_counted(tmp_path):
    """VP8 has packets whose frame is not shown: bit 4 of the first byte (RFC 6386, 9.1) is 0. Here one before every key frame."""
    source = grey_video(tmp_path / "plain.webm", even(40), codec="libvpx", options={"b:v": "2M", "g": "8"})
    with av.open(str(source)) as old, av.open(str(tmp_path / "hidden.webm"), "w") as new:
        target, hidden = new.add_stream("libvpx", rate=24), 0
        target.height, target.width, target.pix_fmt = 48, 80, "yuv420p"
        for packet in old.demux(video=0):
            if packet.size and packet.is_keyframe and packet.pts:
                data = bytearray(bytes(packet))
                data[0] &= 0xEF
                twin = av.Packet(bytes(data))
                twin.pts = twin.dts = packet.pts - 5
                twin.time_base, twin.stream, hidden = packet.time_base, target, hidden + 1
                new.mux(twin)
            if packet.size:
                packet.stream = target
                new.mux(packet)
    assert hidden >= 3
    assert numbers(tmp_path / "hidden.webm", frames=20, fps=12.0) == list(range(0, 40, 2))
    with pytest.raises(VideoError, match="need 1.67 s"):
        numbers(tmp_path / "hidden.webm", frames=21, fps=12.0)


CUTS = {
    "vp9.mp4": ("libvpx-vp9", {"lag-in-frames": "0"}, 10),
    "h264.mp4": ("libx264", {"x264-params": "bframes=0"}, 7),
    "h264 with B-frames.mp4": ("libx264", B_FRAMES, 9),
    "h264 with B-frames.mov": ("libx264", B_FRAMES, 3),
    "hevc.mp4": ("libx265", {"x265-params": "log-level=0"}, 12),
}


@pytest.mark.parametrize("name", CUTS)
def test_a_trimmed_file_begins_where_its_edit_list_says(tmp_path, name):
    """Cut without encoding anew: packets before the cut stay, as later ones refer to them, and an edit list hides them."""
    codec, options, cut = CUTS[name]
    whole = grey_video(tmp_path / f"whole {name}", even(40), codec=codec, options=options)
    path = remuxed(tmp_path / name, whole, cut=cut / 24)
    count = (41 - cut) // 2
    assert numbers(path, frames=count, fps=12.0) == list(range(cut, 40, 2))
    with pytest.raises(VideoError, match="need"):
        numbers(path, frames=count + 1, fps=12.0)


@pytest.mark.parametrize("ending", ["mkv", "ts", "mp4", "mov"])
@pytest.mark.parametrize("shift", [-3.0, 7.5], ids=["late", "early"])
def test_a_file_need_not_begin_at_zero(tmp_path, ending, shift):
    """Recordings that were cut out of longer ones, or whose first time stamps are negative where the container can hold them."""
    whole = grey_video(tmp_path / "whole.mp4", even(24), codec="libx264", options=B_FRAMES)
    if shift > 0 and ending in ("mp4", "mov"):
        pytest.skip("an edit list hides what lies before zero")
    path = remuxed(tmp_path / f"a.{ending}", whole, cut=shift)
    assert numbers(path, frames=12, fps=12.0) == list(range(0, 24, 2))


def test_uneven_frames_with_a_cut(tmp_path):
    """Eight frames a second, then 30: after the cut the clip follows the times, not the numbers."""
    stamps = [125 * i for i in range(8)] + [1000 + round(1000 * i / 30) for i in range(32)]
    whole = grey_video(tmp_path / "whole.mp4", stamps, codec="libx264", options=B_FRAMES)
    path = remuxed(tmp_path / "cut.mp4", whole, cut=0.5)
    assert numbers(path, frames=5, fps=8.0) == [4, 5, 6, 7, 8]
    assert numbers(remuxed(tmp_path / "late.mp4", whole, cut=1.0), frames=10, fps=10.0) == list(range(8, 38, 3))
    with pytest.raises(VideoError, match=r"stays for 0\.125 s, need at most 0\.100 s .*lower --fps"):
        numbers(path, frames=5, fps=10.0)


def test_a_gap_in_the_middle_shows_the_frame_before_it(tmp_path):
    stamps = even(8) + [stamp + 500 for stamp in even(16)[8:]]
    path = grey_video(tmp_path / "gap.webm", stamps)
    assert numbers(path, frames=2, fps=2.0) == [0, 7]
    with pytest.raises(VideoError, match="frames come twice"):
        numbers(path, frames=8, fps=12.0)


def shown(times, seconds=0.0):
    return [Shown(time, seconds, number) for number, time in enumerate(times)]


def chosen(times, *, frames, fps, seconds=0.0):
    return [each.frame for each in on_screen(shown(times, seconds), frames=frames, fps=fps)]


def test_frames_are_those_on_screen():
    steady = np.arange(10) / 10
    assert chosen(steady, frames=4, fps=10.0) == [0, 1, 2, 3]
    assert chosen(steady, frames=4, fps=4.0) == [0, 2, 5, 7]
    rounded = np.round(np.arange(10) / 30, 3)  # to milliseconds, as WebM has them
    assert chosen(rounded, frames=5, fps=15.0) == [0, 2, 4, 6, 8]
    assert chosen([0, 0.05, 0.5, 0.55, 0.9], frames=3, fps=2.5) == [0, 1, 3]
    assert chosen([0.0], frames=1, fps=16.0) == [0]
    assert chosen([0, 0.5], frames=2, fps=1.2, seconds=0.9) == [0, 1], "the last frame stays for 0.9 s"


@pytest.mark.parametrize(
    ("times", "seconds", "frames", "fps", "message"),
    [
        ([0, 0.1, 0.2], 0.1, 5, 10.0, "got 0.30 s, need 0.40 s for 5 frames at 10 a second"),
        ([0, 0.1, 0.2], 0.0, 5, 10.0, "got 0.30 s, need 0.40 s"),
        ([0, 0.1, 0.2, 0.3, 0.4], 0.1, 5, 20.0, r"stays for 0\.100 s, need at most 0\.050 s \(--fps 20\)"),
        ([0, 0.1], 2.0, 5, 10.0, r"stays for 2\.000 s, need at most 0\.100 s"),
        ([0.0], 0.0, 2, 16.0, "got 0.00 s"),
    ],
)
def test_short_and_slow_videos_are_refused(times, seconds, frames, fps, message):
    with pytest.raises(VideoError, match=message):
        chosen(times, seconds=seconds, frames=frames, fps=fps)


CORNER = np.full((48, 80, 3), 40, np.uint8)
CORNER[:12, :20], CORNER[:12, 60:] = 220, 130
"""Bright at the top left, grey at the top right."""


def applied(matrix, picture):
    """The picture [H, W, 3] as shown, pixel by pixel from the definition of the matrix."""
    a, b, c, d = matrix
    y, x = np.mgrid[: picture.shape[0], : picture.shape[1]]
    to_x, to_y = a * x + c * y, b * x + d * y
    to_x, to_y = (to_x - to_x.min()).round().astype(int), (to_y - to_y.min()).round().astype(int)
    out = np.zeros((to_y.max() + 1, to_x.max() + 1, 3), np.uint8)
    out[to_y, to_x] = picture
    return out


@pytest.mark.parametrize("name", [name for name in MATRICES if "30" not in name])
def test_turned_and_mirrored_videos_are_shown_upright(tmp_path, name):
    plain = write_video(tmp_path / "plain.mp4", np.stack([CORNER] * 6))
    path = with_matrix(tmp_path / "turned.mp4", plain, MATRICES[name])
    expected = applied(MATRICES[name], CORNER)
    height, width = expected.shape[:2]
    clip_CTHW = ClipReader(frames=3, height=height, width=width, fps=12.0, device=CPU).read(path)
    got = ((clip_CTHW[:, 1].movedim(0, -1) + 1) * 127.5).numpy()
    assert np.abs(got - expected).mean() < 4, f"{name}: {np.abs(got - expected).mean():.1f} grey levels"
    assert np.abs(got[:, ::-1] - expected).mean() > 8, "the picture would not show a mistake"


@pytest.mark.parametrize("ending", ["mp4", "mov", "mkv"])
def test_the_rotation_that_a_phone_notes(tmp_path, ending):
    with av.open(str(tmp_path / f"a.{ending}"), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.height, stream.width, stream.pix_fmt = 48, 80, "yuv420p"
        stream.set_display_rotation(90)  # counterclockwise
        for _ in range(6):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(CORNER, format="rgb24")))
        container.mux(stream.encode())
    clip_CTHW = ClipReader(frames=2, height=80, width=48, fps=12.0, device=CPU).read(tmp_path / f"a.{ending}")
    got = ((clip_CTHW[:, 0].movedim(0, -1) + 1) * 127.5).numpy()
    assert np.abs(got - np.rot90(CORNER)).mean() < 4


def test_odd_matrices_are_refused_by_name(tmp_path):
    plain = write_video(tmp_path / "plain.mp4", smooth_frames(4))
    with pytest.raises(VideoError, match=r"turned by the matrix .*need a multiple of 90 degrees; re-encode"):
        probe(with_matrix(tmp_path / "turned.mp4", plain, MATRICES["turned by 30"]))

    def packed(*values):
        return np.array(values, np.int32).tobytes()

    assert orientation(None) == orientation(packed(*[0] * 9)) == (False, (False, False))
    assert orientation(packed(65536, 3, 0, -2, -65536, 0, 0, 0, 1 << 30)) == (False, (True, False)), "rounding"
    for matrix in ((65536, 0, 9, 0, 65536, 0, 0, 0, 1 << 30), (65536, 0, 0, 65536, 0, 0, 0, 0, 1 << 30)):
        with pytest.raises(VideoError, match="turned by the matrix"):
            orientation(packed(*matrix))


@pytest.mark.parametrize("aspect", [Fraction(4, 3), Fraction(8, 9), Fraction(2), Fraction(1, 2)])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "turned.mp4"])
def test_pixels_that_are_not_square_are_stretched(tmp_path, name, aspect):
    """A disc that is round on the screen is round in the clip, whose largest crop has the screen's proportions."""
    width = round(144 / aspect)
    y, x = np.mgrid[:96, :width]
    disc = ((x + 0.5 - width / 2) * float(aspect)) ** 2 + (y + 0.5 - 48) ** 2 < 30**2
    picture = np.where(disc, 220, 30).astype(np.uint8)[..., None].repeat(3, 2)
    path = tmp_path / ("plain.mp4" if name == "turned.mp4" else name)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.height, stream.width, stream.pix_fmt = 96, width, "yuv420p"
        stream.codec_context.sample_aspect_ratio = aspect
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    size = {"height": 48, "width": 72}
    if name == "turned.mp4":
        path, size = write_rotated(tmp_path / name, path), {"height": 72, "width": 48}
    clip_CTHW = ClipReader(frames=1, fps=12.0, device=CPU, **size).read(path)
    bright = clip_CTHW[0, 0] > 0
    assert (int(bright.any(1).sum()), int(bright.any(0).sum())) == pytest.approx((30, 30), abs=1.5)


def test_the_crop_is_the_largest_centred_one():
    def box(rows, columns, **facts):
        return crop_box(VideoFacts(codec="vp9", **facts), height=rows, width=columns)

    assert box(20, 30, height=100, width=300) == (75, 0, 225, 100)
    assert box(20, 30, height=101, width=30) == (0, 40.5, 30, 60.5)
    turned = (150 - 100 / 3, 0, 150 + 100 / 3, 100)
    assert box(20, 30, height=100, width=300, transposed=True) == pytest.approx(turned)
    assert box(20, 30, height=100, width=300, pixel_aspect=0.5) == (0, 0, 300, 100)


def test_other_pictures_in_a_file_are_not_its_video(tmp_path):
    """A cover, as podcasts and films have it, before the video."""
    video = grey_video(tmp_path / "plain.mp4", even(12))
    with av.open(str(video)) as old, av.open(str(tmp_path / "cover.mp4"), "w") as new:
        cover = new.add_stream("mjpeg", rate=1)
        cover.height, cover.width, cover.pix_fmt = 32, 32, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        target = new.add_stream_from_template(old.streams.video[0])
        picture = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 250, np.uint8), format="rgb24")
        new.mux([*cover.encode(picture), *cover.encode()])
        for packet in old.demux(video=0):
            if packet.dts is not None:
                packet.stream = target
                new.mux(packet)
    assert numbers(tmp_path / "cover.mp4", frames=6, fps=12.0) == [0, 2, 4, 6, 8, 10]


def test_a_video_that_changes_its_size_is_named(tmp_path):
    parts = [grey_video(tmp_path / f"{w}.ts", even(12), codec="libx264", size=(48, w)) for w in (80, 96)]
    (tmp_path / "both.ts").write_bytes(b"".join(part.read_bytes() for part in parts))
    with pytest.raises(VideoError, match=r"got frames of 48x80 and 48x96, need one size|go back by"):
        numbers(tmp_path / "both.ts", frames=12, fps=12.0)


def test_time_stamps_that_go_back_are_named(tmp_path):
    part = grey_video(tmp_path / "a.ts", even(6), codec="libx264", options=B_FRAMES).read_bytes()
    late = remuxed(tmp_path / "late.ts", tmp_path / "a.ts", cut=-20.0).read_bytes()
    (tmp_path / "both.ts").write_bytes(late + part)
    with pytest.raises(VideoError, match=r"go back by|stays for"):
        numbers(tmp_path / "both.ts", frames=6, fps=12.0)


def test_hdr_is_refused_by_name(tmp_path):
    with av.open(str(tmp_path / "hdr.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.height, stream.width, stream.pix_fmt = 48, 80, "yuv420p"
        stream.codec_context.color_trc = 18
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(CORNER, format="rgb24")))
        container.mux(stream.encode())
    with pytest.raises(VideoError, match=r"got HDR \(HLG\)"):
        probe(tmp_path / "hdr.mp4")


@pytest.mark.parametrize("name", ["a%03d.mp4", "http:x.mp4", "é #1?.mp4", "-i.mp4"])
def test_a_name_is_a_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    grey_video(tmp_path / "plain.mp4", even(4)).rename(name)
    (path,) = find_videos(tmp_path)
    assert numbers(path.relative_to(tmp_path), frames=2, fps=12.0) == [0, 2]


def test_videos_are_found_in_order_and_dot_files_are_none(tmp_path):
    for name in ("b.mp4", "a.WEBM", "c/a.mkv", "a.txt", "d.gif", "._b.mp4", ".trash/x.mp4", "c/.a.mov", ".mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "away.mp4").symlink_to("/nowhere/away.mp4")
    (tmp_path / "folder.mp4").mkdir()
    names = ["a.WEBM", "away.mp4", "b.mp4", "c/a.mkv"]
    assert [str(path.relative_to(tmp_path)) for path in find_videos(tmp_path)] == names
    with pytest.raises(VideoError, match="cannot be read"):
        probe(tmp_path / "away.mp4")


def test_a_name_that_is_not_utf8_is_a_message(tmp_path):
    path = tmp_path / b"caf\xe9.mp4".decode("utf-8", "surrogateescape")
    grey_video(tmp_path / "plain.mp4", even(2)).rename(path)
    assert find_videos(tmp_path) == [path]
    with pytest.raises(VideoError, match="its name is not UTF-8"):
        probe(path)


def test_videos_whose_packets_are_their_frames_are_numbered_without_decoding(tmp_path):
    """What DALI, which counts packets, may decode on a GPU; hidden frames, cuts and AVI are the CPU's."""
    facts = VideoFacts(codec="h264", height=48, width=80)
    whole = grey_video(tmp_path / "whole.mp4", even(20), codec="libx264", options=B_FRAMES)
    found = numbered_frames(whole, facts)
    assert [each.frame for each in found] == list(range(20))
    assert [each.time for each in found] == pytest.approx(np.arange(20) / 24, abs=1e-3)
    assert numbered_frames(remuxed(tmp_path / "cut.mp4", whole, cut=5 / 24), facts) is None
    assert numbered_frames(whole, VideoFacts(codec="vp8", height=48, width=80)) is None
    assert numbered_frames(grey_video(tmp_path / "a.avi", range(9), codec="mpeg4", rate=24), facts) is None


def test_the_matrix_that_corrects_dali(tmp_path):
    """ITU-R BT.709's green of a BT.601 decoder's output."""
    y, cb, cr = 0.5, 0.1, -0.2
    wrong = torch.tensor([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb])
    right = torch.tensor([y + 1.5748 * cr, y - 0.187324 * cb - 0.468124 * cr, y + 1.8556 * cb])
    assert torch.allclose(from_bt601_to_bt709() @ wrong, right, atol=1e-5)
