"""Videos on disk as they are finished: a kill leaves what was done, and nothing half-written under a finished name.

    ROOT/recipe.json              how all of it was made; another recipe in the same folder is refused
    ROOT/videos/[SAMPLER/]…mp4    videos alone, as VBench's reader of the folder asks
    ROOT/measured/SAMPLER/…       features and statistics of each, where an evaluation takes them
    ROOT/partial, ROOT/text       while it runs

Shapes: C channels, T frames, H, W pixels, F features.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from rcm_megatron.data.media import to_frames, write_mp4
from rcm_megatron.errors import InputError
from rcm_megatron.evaluation.prompts import Clip
from rcm_megatron.files import write_atomically

_POLL_SECONDS = 1.0
RECIPE, PARTIAL, TEXT = "recipe.json", "partial", "text"


@dataclass(frozen=True, kw_only=True)
class VideoStore:
    """The videos of one sampler under ``root``."""

    root: Path
    sampler: str = ""
    """Its folder; "" for the flat folder of a single one."""
    measured: bool = False
    """Whether a video is done when it has been measured, not when it is there."""
    fps: int = 16

    def video(self, clip: Clip) -> Path:
        return self.root / "videos" / self.sampler / f"{clip.stem}.mp4"

    def measures(self, clip: Clip) -> Path:
        return self.root / "measured" / self.sampler / f"{clip.stem}.safetensors"

    def has(self, clip: Clip) -> bool:
        """Whether it is finished."""
        return self.video(clip).is_file() and (not self.measured or self.measures(clip).is_file())

    def put_video(self, clip: Clip, video_CTHW: Tensor) -> None:
        """Pixels in [-1, 1]; the file appears when it is whole and on the disk."""
        partial = self._partial("mp4")
        write_mp4(partial, to_frames(video_CTHW), fps=self.fps)
        _finish(partial, self.video(clip))

    def put_measures(self, clip: Clip, features_F: Tensor, statistics: Mapping[str, float]) -> None:
        partial = self._partial("safetensors")
        values = torch.tensor(list(statistics.values()), dtype=torch.float64)
        # one key, for safetensors writes several in any order, and files of equal content are to be equal
        about = {"about": json.dumps({"statistics": list(statistics), "prompt": clip.prompt})}
        partial.write_bytes(save({"features": features_F.contiguous(), "statistics": values}, metadata=about))
        _finish(partial, self.measures(clip))

    def get_measures(self, clip: Clip) -> tuple[Tensor, dict[str, float]]:
        """(features [F], statistics) of a finished video, which another node may have finished: its file may be seen a little later."""
        while not self.measures(clip).is_file():
            time.sleep(_POLL_SECONDS)
        with safe_open(self.measures(clip), "pt") as file:
            names = json.loads(file.metadata()["about"])["statistics"]
            return file.get_tensor("features"), dict(zip(names, file.get_tensor("statistics").tolist(), strict=True))

    def _partial(self, ending: str) -> Path:
        """Not beside the target: VBench takes whatever is in its folder, and a prompt may fill a name."""
        return self.root / PARTIAL / f"{uuid.uuid4().hex}.{ending}"


def _finish(partial: Path, target: Path) -> None:
    """From here on it counts."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    partial.rename(target)


def open_root(root: Path, recipe: Mapping[str, object]) -> None:
    """Begin, or go on with what another start of this recipe has left. InputError where ``root`` holds something else."""
    path, recipe = root / RECIPE, json.loads(json.dumps(recipe))
    if path.exists():
        try:
            found = json.loads(path.read_text())
        except ValueError as error:
            raise InputError(
                f"{path} cannot be read ({error}); fix: delete it with its folder, or choose another --output"
            ) from error
        differing = sorted(key for key in {*found, *recipe} if found.get(key) != recipe.get(key))
        if differing and not any((root / "videos").rglob("*.mp4")):
            # nothing was made by the other recipe, which may have been refused later
            shutil.rmtree(root / TEXT, ignore_errors=True)
        elif differing:
            key = differing[0]
            raise InputError(
                f"{root} holds videos of another recipe: {key} is {found.get(key)!r:.200}, and is asked to be {recipe.get(key)!r:.200}"
                f"{_others(differing)}; fix: choose another --output, or delete it"
            )
    elif root.exists() and any(each for each in root.iterdir() if not each.name.startswith(".")):
        raise InputError(f"{root} holds files, but no {RECIPE}; need an empty folder; fix: choose another --output")
    shutil.rmtree(root / PARTIAL, ignore_errors=True)
    (root / PARTIAL).mkdir(parents=True)
    write_atomically(path, (json.dumps(recipe, indent=1) + "\n").encode())


def close_root(root: Path) -> None:
    """Take away what was needed while it ran."""
    for name in (PARTIAL, TEXT):
        shutil.rmtree(root / name, ignore_errors=True)


def _others(differing: list[str]) -> str:
    return f" (so are {', '.join(differing[1:])})" if len(differing) > 1 else ""
