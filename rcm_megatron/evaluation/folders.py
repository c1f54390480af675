"""Folders of videos that exist already, from whatever tool: found, read, measured.

Shapes: C channels, T frames, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from rcm_megatron.data.video import ClipReader, find_videos
from rcm_megatron.data.video_frames import VideoError, VideoFacts, open_video, probe, to_rgb
from rcm_megatron.data.video_statistics import video_statistics
from rcm_megatron.errors import InputError
from rcm_megatron.evaluation.features import FeatureNetwork, VideoSet
from rcm_megatron.evaluation.prompts import prompt_of
from rcm_megatron.progress import bar_interval

_CUT = "cut all of them alike with --size HxW --frames T --fps RATE, the least of each"
_NAMED = 3
"""Videos that a message gives as examples."""


def find_set(folder: Path) -> list[Path]:
    """The videos of a folder; dot files, which macOS lays beside each, are none. InputError for no folder, or none in it."""
    if not folder.is_dir():
        raise InputError(
            f"got {folder}, which is no folder; need one of videos, or features as .npy or .safetensors; fix: check the path"
        )
    if not (videos := find_videos(folder)):
        raise InputError(
            f"got no video in {folder}, need some (.mp4 or others, dot files do not count); fix: name the folder that holds them"
        )
    return videos


def read_video(path: Path, *, name: str | None = None) -> Tensor:
    """All frames [3, T, H, W] of a video as they are shown, float32 in [-1, 1]. VideoError names the file."""
    try:
        with open_video(path) as (facts, shown):
            frames = [torch.from_numpy(upright(to_rgb(each.frame, facts), facts)) for each in shown]
    except VideoError as error:
        raise VideoError(f"{name or path}: {error}") from error
    return torch.stack(frames).movedim(-1, 0).float().div(127.5).sub(1)


def upright(frame_HWC: np.ndarray, facts: VideoFacts) -> np.ndarray:
    """A stored frame as it is shown."""
    shown = frame_HWC.transpose(1, 0, 2) if facts.transposed else frame_HWC
    return np.ascontiguousarray(np.flip(shown, [axis for axis, flipped in enumerate(facts.flips) if flipped]))


@dataclass(frozen=True, kw_only=True)
class Conform:
    """What all videos are cut to."""

    size: tuple[int, int]
    frames: int
    fps: float

    def reader(self) -> Callable[[Path], Tensor]:
        height, width = self.size
        return ClipReader(frames=self.frames, height=height, width=width, fps=self.fps, device=torch.device("cpu")).read


def conform_of(size: tuple[int, int] | None, frames: int | None, fps: float | None) -> Conform | None:
    """None where nothing is asked. InputError for a part of it."""
    asked = {"--size": size, "--frames": frames, "--fps": fps}
    if all(value is None for value in asked.values()):
        return None
    if missing := [option for option, value in asked.items() if value is None]:
        raise InputError(
            f"got no {' and no '.join(missing)}, need --size, --frames and --fps together; fix: e.g. --size 480x832 --frames 81 --fps 16"
        )
    if frames < 2 or fps <= 0 or min(size) < 3:
        raise InputError(
            f"got --size {size[0]}x{size[1]} --frames {frames} --fps {fps:g}, need at least 3x3, 2 and more than 0"
        )
    return Conform(size=size, frames=frames, fps=fps)


def measure_folder(folder: Path, network: FeatureNetwork, *, conform: Conform | None, seen: ShapesSeen) -> VideoSet:
    """Features and statistics of every video. InputError at the first whose length or size is not that of those before."""
    videos = find_set(folder)
    read = read_video if conform is None else partial(_conformed, read=conform.reader())
    features, statistics = [], []
    for path in tqdm(videos, folder.name, unit="video", mininterval=bar_interval()):
        video_CTHW = read(path)
        seen.note("lengths", f"{video_CTHW.shape[1]} frames", path)
        features.append(network(video_CTHW, what=str(path)))
        statistics.append(video_statistics(video_CTHW))
    prompts = tuple(prompt_of(path) for path in videos)
    facts = {"folder": str(folder), "frames": video_CTHW.shape[1]}
    name = folder.name or str(folder)
    return VideoSet(
        name=name, features_NF=torch.stack(features), prompts=prompts, statistics=tuple(statistics), facts=facts
    )


class ShapesSeen:
    """Lengths and sizes of all videos of a comparison: motion is in pixels a frame, and networks see size, so there must be one."""

    def __init__(self, *, fix: str = _CUT) -> None:
        self._fix = fix
        self._files: dict[str, dict[str, list[Path]]] = {}

    def note_sizes(self, folder: Path) -> None:
        """Look at the first frame of every video, which takes milliseconds each. InputError lists the sizes of the folders so far."""
        for path in find_set(folder):
            try:
                facts = probe(path)
            except VideoError as error:
                raise VideoError(f"{path}: {error}") from error
            height, width = (facts.width, facts.height) if facts.transposed else (facts.height, facts.width)
            self._files.setdefault("sizes", {}).setdefault(f"{height}x{width}", []).append(path)
        self._require_one("sizes")

    def note(self, kind: str, value: str, path: Path) -> None:
        self._files.setdefault(kind, {}).setdefault(value, []).append(path)
        self._require_one(kind)

    def _require_one(self, kind: str) -> None:
        files = self._files[kind]
        if len(files) < 2:
            return
        most_first = sorted(files.items(), key=lambda item: -len(item[1]))[:_NAMED]
        listed = "; ".join(f"{len(paths)} of {value} (e.g. {paths[0]})" for value, paths in most_first)
        raise InputError(
            f"got videos of {len(files)} {kind}: {listed}; need one, for networks see size and length; fix: {self._fix}"
        )


def _conformed(path: Path, *, read: Callable[[Path], Tensor]) -> Tensor:
    try:
        return read(path)
    except VideoError as error:
        raise VideoError(f"{path}: {error}") from error
