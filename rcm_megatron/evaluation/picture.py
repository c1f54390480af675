"""The pictures of an evaluation: bars of its figures, and sheets of videos, a row a sampler.

Shapes: T frames, H, W pixels, C channels (RGB).
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot
from PIL import Image

from rcm_megatron.data.media import draw_grid, frame_strip, write_png
from rcm_megatron.data.video_frames import open_video, to_rgb
from rcm_megatron.data.video_statistics import STATISTICS
from rcm_megatron.evaluation.folders import upright
from rcm_megatron.evaluation.report import Row
from rcm_megatron.reports.plot import RUN_COLOURS

_HEIGHT = 96
"""Pixels of a video on a sheet."""
_FRAMES = 4
_CHARACTER_WIDTH = 8


def draw_bars(rows: Sequence[Row], path: Path, *, title: str) -> None:
    """A panel a figure, a bar a row; diversity with its interval."""
    panels = _panels(rows)
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    size = (3.6 * columns + 2.4, (0.8 + 0.24 * len(rows)) * lines + 0.8)
    figure, axes = pyplot.subplots(lines, columns, figsize=size, squeeze=False, sharey=True, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    names, colours = [row.name for row in rows], [RUN_COLOURS[_who(rows, row) % len(RUN_COLOURS)] for row in rows]
    for (label, value), axis in zip(panels.items(), axes.flat, strict=False):
        values = [value(row) for row in rows]
        axis.barh(range(len(rows)), [0.0 if v is None else v for v in values], color=colours, height=0.7)
        ends = _draw_intervals(axis, rows) if label == "diversity" else values
        for place, (v, end) in enumerate(zip(values, ends, strict=True)):
            axis.text(
                end or 0,
                place,
                " –" if v is None else f" {v:,.0f}" if v >= 1000 else f" {v:.3g}",
                va="center",
                fontsize=7,
            )
        axis.set_title(label, fontsize=9)
        axis.set_yticks(range(len(rows)), names, fontsize=8)
        axis.tick_params(axis="x", labelsize=7)
        axis.margins(x=0.2)
        axis.spines[["top", "right"]].set_visible(False)
    axes.flat[0].invert_yaxis()
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _panels(rows: Sequence[Row]) -> dict[str, Callable[[Row], float | None]]:
    """Title -> value of a row, of what some row has."""
    found: dict[str, Callable[[Row], float | None]] = {}
    for name, title in {
        "precision": "",
        "recall": "",
        "density": "",
        "coverage": "",
        "frechet": "Fréchet distance",
    }.items():
        found[title or name] = lambda row, name=name: None if row.compared is None else getattr(row.compared, name)
    found["diversity"] = lambda row: None if row.diversity is None else row.diversity.value
    found["Vendi score within a prompt"] = lambda row: row.vendi
    for name, title in STATISTICS.items():
        found[title] = lambda row, name=name: None if row.statistics is None else row.statistics[name]
    # saturation of grey videos is 0
    return {title: value for title, value in found.items() if any(value(row) for row in rows)}


def _who(rows: Sequence[Row], row: Row) -> int:
    """Which network a row is of: rows of one have one colour."""
    return list(dict.fromkeys(each.name.split(",")[0] for each in rows)).index(row.name.split(",")[0])


def _draw_intervals(axis, rows: Sequence[Row]) -> list[float]:
    """Their upper ends."""
    for place, row in enumerate(rows):
        if row.diversity is not None:
            axis.plot([row.diversity.low, row.diversity.high], [place, place], color="black", linewidth=1)
    return [0.0 if row.diversity is None else row.diversity.high for row in rows]


def draw_sheet(rows: Sequence[tuple[str, Sequence[Path]]], path: Path, *, captions: Sequence[str], title: str) -> None:
    """(label, one video a column) of each row, four frames of a video from left to right."""
    cells = [[_strip(video) for video in videos] for _, videos in rows]
    size = np.array([cell.shape[:2] for line in cells for cell in line]).min(axis=0)
    cells = [[cell[: size[0], : size[1]] for cell in line] for line in cells]
    width = int(size[1] / _CHARACTER_WIDTH)
    short = [textwrap.shorten(caption, width=max(8, width), placeholder="…") for caption in captions]
    write_png(
        path, draw_grid(cells, row_labels=[label for label, _ in rows], captions=short, title=title, label_width=330)
    )


def _strip(path: Path) -> np.ndarray:
    """Frames of a video side by side, small: [H, W, 3]."""
    with open_video(path) as (facts, shown):
        frames = [upright(to_rgb(each.frame, facts), facts) for each in shown]
    chosen = [frames[i] for i in np.linspace(0, len(frames) - 1, min(_FRAMES, len(frames))).round().astype(int)]
    height, width = chosen[0].shape[:2]
    size = (max(1, round(width * _HEIGHT / height)), _HEIGHT)
    return frame_strip(np.stack([np.asarray(Image.fromarray(frame).resize(size)) for frame in chosen]), gap=2)
