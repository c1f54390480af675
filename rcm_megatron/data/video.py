"""Raw videos to clips of one length, size and frame rate: PyAV decodes on the CPU, NVIDIA DALI on a GPU.

Shapes: C channels (RGB), T frames, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rcm_megatron.data.video_frames import VideoError, VideoFacts, on_screen, open_video, probe, to_rgb
from rcm_megatron.data.video_gpu import GPUDecoder, numbered_frames

__all__ = ["ENDINGS", "ClipReader", "VideoError", "crop_box", "find_videos", "probe"]

ENDINGS = (
    ".3gp",
    ".avi",
    ".m2ts",
    ".m4v",
    ".mkv",
    ".mov",
    ".mp4",
    ".mpeg",
    ".mpg",
    ".mts",
    ".ts",
    ".webm",
)


def find_videos(folder: Path) -> list[Path]:
    """All videos of a folder and its subfolders, in the order of their names; a broken link is one, to be named at its turn.

    Dot files and folders are passed over: macOS lays `._<name>.mp4` beside each file.
    """
    found = (
        path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS and (path.is_file() or path.is_symlink())
    )
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def crop_box(facts: VideoFacts, *, height: int, width: int) -> tuple[float, float, float, float]:
    """The largest centred box of the shown shape `height` x `width`: (left, top, right, bottom), in stored pixels, not rounded."""
    height, width = _stored(facts, height, width)
    scale = min(facts.height / height, facts.width * facts.pixel_aspect / width)
    box_height, box_width = height * scale, width * scale / facts.pixel_aspect
    top, left = (facts.height - box_height) / 2, (facts.width - box_width) / 2
    return left, top, left + box_width, top + box_height


class ClipReader:
    """Clips [C, T, H, W] of one shape, float32 in [-1, 1], from the beginning of videos of any size and frame rate.

    The frames on screen at 0, 1/fps, …; upright, with square pixels; the largest centred crop; Pillow's antialiased bicubic resize, or on
    a GPU DALI's, which is the same to one grey level.
    """

    def __init__(self, *, frames: int, height: int, width: int, fps: float, device: torch.device) -> None:
        self.frames, self.height, self.width, self.fps = frames, height, width, fps
        self._gpu = GPUDecoder(device) if device.type == "cuda" else None

    def read(self, path: Path) -> Tensor:
        """The clip of one video, on the CPU; VideoError if it gives none."""
        with open_video(path) as (facts, shown):
            box = crop_box(facts, height=self.height, width=self.width)
            size = _stored(facts, self.height, self.width)
            numbered = numbered_frames(path, facts) if self._gpu else None
            if numbered is not None:
                chosen = [each.frame for each in on_screen(numbered, frames=self.frames, fps=self.fps)]
                clip_THWC = self._gpu.decode(path, chosen, facts, box=box, size=size)
            else:
                chosen = on_screen(shown, frames=self.frames, fps=self.fps)
                clip_THWC = _resized((to_rgb(each.frame, facts) for each in chosen), box=box, size=size)
        clip_CTHW = clip_THWC.movedim(-1, 0).div(127.5).sub(1).clamp(-1, 1)
        clip_CTHW = clip_CTHW.transpose(2, 3) if facts.transposed else clip_CTHW
        return clip_CTHW.flip([axis for axis, flipped in zip((2, 3), facts.flips, strict=True) if flipped]).contiguous()


def _resized(
    pictures: Iterable[np.ndarray], *, box: tuple[float, float, float, float], size: tuple[int, int]
) -> Tensor:
    """float32 [T, H, W, 3] in 0 to 255 of pictures [H, W, 3]."""
    height, width = size
    small = [Image.fromarray(each).resize((width, height), Image.Resampling.BICUBIC, box=box) for each in pictures]
    return torch.from_numpy(np.stack([np.asarray(each) for each in small])).float()


def _stored(facts: VideoFacts, height: int, width: int) -> tuple[int, int]:
    """A shown size in the axes of the stored frames."""
    return (width, height) if facts.transposed else (height, width)
