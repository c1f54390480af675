"""Videos for the eye: MP4 files, and grids of small videos with captions above and row labels beside.

Shapes: C channels, T frames, H, W pixels; the last C of THWC and HWC is RGB.
"""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
from torch import Tensor

from rcm_megatron.finite import require_finite

VIEWABLE_SIDE = 128
"""Shorter side, in pixels, that small videos are enlarged to."""
_CODEC = "libx264" if "libx264" in av.codecs_available else "mpeg4"
_DPI = 100
_BACKGROUND = 255
_TITLE_HEIGHT, _LINE_HEIGHT, _FONT_POINTS = 40, 20, 10
_CHARACTER_WIDTH = 8.5
"""Pixels of the mean character of a caption at that size."""
_FONTS = ["DejaVu Sans", "Noto Sans CJK SC", "WenQuanYi Zen Hei"]
"""The first that is installed and has a character draws it."""


def to_frames(video_CTHW: Tensor, *, scale: int | None = None) -> np.ndarray:
    """uint8 RGB frames [T, H*scale, W*scale, 3] of pixels in [-1, 1], C 1 (grey) or 3, enlarged by repeating pixels.

    `scale` None: the least at which the shorter side has `VIEWABLE_SIDE` pixels. Raises ValueError for another C.
    """
    channels, _, height, width = video_CTHW.shape
    if channels not in (1, 3):
        raise ValueError(
            f"got {channels} channels, need 1 (grey) or 3 (RGB); decode latents with their video encoder first"
        )
    require_finite(video_CTHW, what="a video")  # as bytes, NaN would be black
    scale = scale or max(1, -(-VIEWABLE_SIDE // min(height, width)))
    video_THWC = video_CTHW.float().clamp(-1, 1).add(1).mul(127.5).round().byte().movedim(0, -1).cpu().numpy()
    rgb_THWC = np.broadcast_to(video_THWC, (*video_THWC.shape[:3], 3))
    return rgb_THWC.repeat(scale, axis=1).repeat(scale, axis=2)


def write_mp4(path: str | Path, frames_THWC: np.ndarray, *, fps: int, loops: int = 1) -> Path:
    """Write uint8 RGB frames `loops` times over; an odd side loses its last pixel, as 4:2:0 colour needs even ones."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = (side - side % 2 for side in frames_THWC.shape[1:3])
    with av.open(str(path), "w") as container:
        stream = container.add_stream(_CODEC, rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": "12"} if _CODEC == "libx264" else {"qscale": "2"}
        for frame_HWC in np.concatenate([frames_THWC[:, :height, :width]] * loops):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def frame_strip(frames_THWC: np.ndarray, *, gap: int = 1) -> np.ndarray:
    """A video's frames side by side, [H, T*W + (T-1)*gap, 3]."""
    height = frames_THWC.shape[1]
    parts = [frames_THWC[0]]
    for frame_HWC in frames_THWC[1:]:
        parts += [np.full((height, gap, 3), 96, dtype=np.uint8), frame_HWC]
    return np.concatenate(parts, axis=1)


def draw_grid(
    cells: Sequence[Sequence[np.ndarray]],
    *,
    row_labels: Sequence[str],
    captions: Sequence[str],
    title: str,
    gap: int = 8,
    label_width: int = 250,
) -> np.ndarray:
    """One picture [H, W, 3]: `cells[row][column]`, all uint8 RGB of one size, pixel for pixel; text around them.

    Its size is `grid_size` of the cells.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cell_height, cell_width = cells[0][0].shape[:2]
    rows, columns = len(cells), len(cells[0])
    height, width = grid_size(rows, columns, cell_height, cell_width, gap=gap, label_width=label_width)
    top = height - rows * (cell_height + gap)
    picture = np.full((height, width, 3), _BACKGROUND, dtype=np.uint8)
    for row, line in enumerate(cells):
        for column, cell_HWC in enumerate(line):
            y, x = top + row * (cell_height + gap), label_width + column * (cell_width + gap)
            picture[y : y + cell_height, x : x + cell_width] = cell_HWC
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)
    canvas = FigureCanvasAgg(figure)
    figure.figimage(picture, origin="upper")
    figure.text(gap / width, 1 - gap / height, title, fontsize=15, va="top", weight="bold")
    for column, caption in enumerate(captions):
        x = label_width + column * (cell_width + gap) + cell_width / 2
        figure.text(x / width, 1 - (top - gap) / height, caption, fontsize=12, ha="center", va="bottom")
    for row, label in enumerate(row_labels):
        y = top + row * (cell_height + gap) + cell_height / 2
        figure.text(gap / width, 1 - y / height, label, fontsize=13, va="center")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def still_grid(
    rows: Sequence[tuple[str, Tensor]], *, captions: Sequence[str], title: str, scale: int | None = None
) -> np.ndarray:
    """`draw_grid` of videos with their frames from left to right; `rows`: (label, one video [C, T, H, W] a column)."""
    cells = [[frame_strip(to_frames(video, scale=scale), gap=2) for video in videos] for _, videos in rows]
    return draw_grid(cells, row_labels=[label for label, _ in rows], captions=captions, title=title)


def moving_grid(
    rows: Sequence[tuple[str, Tensor]], *, captions: Sequence[str], title: str, scale: int | None = None
) -> np.ndarray:
    """Frames [T, H, W, 3] of `draw_grid` in which every video plays."""
    cells = [[to_frames(video, scale=scale) for video in videos] for _, videos in rows]
    labels, times = [label for label, _ in rows], range(len(cells[0][0]))
    frames = [[[cell_THWC[time] for cell_THWC in line] for line in cells] for time in times]
    return np.stack([draw_grid(frame, row_labels=labels, captions=captions, title=title) for frame in frames])


def grid_size(
    rows: int, columns: int, cell_height: int, cell_width: int, *, gap: int = 8, label_width: int = 250
) -> tuple[int, int]:
    """(height, width) in pixels of `draw_grid`'s picture, both even."""
    height = 64 + rows * (cell_height + gap)
    width = label_width + columns * (cell_width + gap)
    return height + height % 2, width + width % 2


def write_png(path: str | Path, picture_HWC: np.ndarray) -> Path:
    """Write an RGB picture."""
    from PIL import Image

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture_HWC).save(path)
    return path


def contact_sheet(
    strips: Sequence[np.ndarray], *, captions: Sequence[str], title: str, gap: int = 8, least_width: int = 640
) -> np.ndarray:
    """One picture [H, W, 3]: the frames [T, H, W, 3] of each video side by side, its caption in one line or two above them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [frame_strip(strip, gap=4) for strip in strips]
    width = max(least_width, max(row.shape[1] for row in rows) + 2 * gap)
    texts = [_shortened(caption, width - 2 * gap) for caption in captions]
    tops, height = [], _TITLE_HEIGHT
    for row, text in zip(rows, texts, strict=True):
        tops.append(height + _LINE_HEIGHT * len(text) + gap)
        height = tops[-1] + row.shape[0] + gap
    picture = np.full((height, width, 3), _BACKGROUND, dtype=np.uint8)
    for row, top in zip(rows, tops, strict=True):
        picture[top : top + row.shape[0], gap : gap + row.shape[1]] = row
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)
    canvas = FigureCanvasAgg(figure)
    figure.figimage(picture, origin="upper")
    fonts = {"va": "top", "parse_math": False}
    figure.text(gap / width, 1 - gap / height, title, fontsize=14, weight="bold", **fonts)
    for text, top in zip(texts, tops, strict=True):
        for line, words in enumerate(text):
            y = top - _LINE_HEIGHT * (len(text) - line) - gap / 2
            figure.text(gap / width, 1 - y / height, words, fontsize=_FONT_POINTS, family=_FONTS, **fonts)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # without a font for a script, boxes stand for it
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _shortened(caption: str, width: int) -> list[str]:
    """At most two lines of about `width` pixels."""
    return textwrap.wrap(" ".join(caption.split()), width=int(width / _CHARACTER_WIDTH), max_lines=2, placeholder=" …")
