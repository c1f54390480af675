"""Where features of videos come from: a network of the user's (a Python function), thumbnails, or files of features.

Shapes: B batch, C channels, T frames, H, W pixels, N videos, F features.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional

from rcm_megatron.errors import InputError
from rcm_megatron.finite import require_finite

THUMBNAILS = "thumbnails"
FEATURE_FILES = (".safetensors", ".npy")
_THUMBNAIL_THW = (4, 8, 8)


@dataclass(frozen=True, kw_only=True)
class FeatureNetwork:
    """Videos to feature vectors."""

    name: str
    call: Callable[[Tensor], Tensor]
    device: torch.device

    @torch.no_grad()
    def __call__(self, video_CTHW: Tensor, *, what: str) -> Tensor:
        """Features [F], float32 on the CPU, of pixels in [-1, 1]. InputError, which says `what`, for anything else that it gives."""
        features_BF = self.call(video_CTHW[None].to(self.device).float().clamp(-1, 1))
        if not isinstance(features_BF, Tensor) or features_BF.ndim != 2 or len(features_BF) != 1:
            got = tuple(features_BF.shape) if isinstance(features_BF, Tensor) else type(features_BF).__name__
            raise InputError(
                f"--features {self.name}: got {got} for one video, need [B, F], here [1, F]; fix: let it return one row a video"
            )
        require_finite(features_BF, what=f"{what}: features of {self.name}")
        return features_BF[0].float().cpu()


def feature_network(name: str, *, weights: Path | None, device: torch.device) -> FeatureNetwork:
    """`thumbnails`, or what `module:function` returns for (``weights``, ``device``): a callable [B, C, T, H, W] -> [B, F].

    The module is the user's own code. A pickled network is not taken: reading it runs what it holds. InputError where it cannot be had.
    """
    if name == THUMBNAILS:
        if weights is not None:
            raise InputError(
                f"got --feature-weights {weights} with --features {THUMBNAILS}, which has none; fix: name a module:function"
            )
        return FeatureNetwork(name=name, call=thumbnails, device=device)
    module, _, function = name.partition(":")
    if not module or not function:
        raise InputError(
            f"got --features {name}, need {THUMBNAILS} or a function of yours as package.module:function; "
            "fix: wrap a network into one, whose weights are a .safetensors file"
        )
    try:
        build = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"--features {name} cannot be imported ({error}); need a module on Python's path; fix: install it, or set PYTHONPATH"
        ) from error
    return FeatureNetwork(name=name, call=build(weights, device), device=device)


def thumbnails(video_BCTHW: Tensor) -> Tensor:
    """Mean colours of 4 stretches of time times 8 x 8 fields, [B, 256 C]: no semantics, but a collapse to one picture shows."""
    return functional.adaptive_avg_pool3d(video_BCTHW, _THUMBNAIL_THW).flatten(1)


@dataclass(frozen=True, kw_only=True, eq=False)
class VideoSet:
    """What is measured of some videos."""

    name: str
    features_NF: Tensor
    prompts: tuple[str, ...]
    """Of each video; "" where nothing says."""
    statistics: tuple[dict[str, float], ...] | None = None
    """Of each video (`data.video_statistics`); None where there are features alone."""
    facts: dict[str, object] = field(default_factory=dict)
    """What else a report says of it."""

    def by_prompt(self) -> dict[str, Tensor]:
        """The vectors [S, F] of each prompt that has at least two videos."""
        rows: dict[str, list[int]] = {}
        for row, prompt in enumerate(self.prompts):
            rows.setdefault(prompt, []).append(row)
        return {prompt: self.features_NF[where] for prompt, where in rows.items() if prompt and len(where) > 1}


def read_features(path: Path) -> VideoSet:
    """A `.npy` file of a matrix [N, F], or a `.safetensors` file with it as `features`, and in its metadata perhaps `prompts`, a JSON list.

    Nothing that could run code is read. InputError for what is no finite matrix of floating-point numbers.
    """
    prompts = None
    try:
        if path.suffix == ".npy":
            features = torch.from_numpy(np.load(path, allow_pickle=False))
        else:
            with safe_open(path, "pt") as file:
                prompts = json.loads((file.metadata() or {}).get("prompts", "null"))
                features = file.get_tensor("features")
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise InputError(
            f"{path} cannot be read as features ({error}); need [N, F] as .npy without pickled objects, or `features` in a .safetensors"
        ) from error
    if features.ndim != 2 or not features.is_floating_point() or 0 in features.shape:
        raise InputError(
            f"{path}: got {features.dtype} {list(features.shape)}, need floating-point features [N, F]; fix: one row a video"
        )
    require_finite(features, what=f"{path}: features")
    if prompts is not None and len(prompts) != len(features):
        raise InputError(
            f"{path}: got {len(prompts)} prompts for {len(features)} rows, need one for each; fix: its metadata"
        )
    return VideoSet(name=path.stem, features_NF=features.float(), prompts=tuple(prompts or [""] * len(features)))


def require_same_features(sets: list[VideoSet]) -> None:
    """InputError for sets of different widths, which come of different networks."""
    for other in sets[1:]:
        widths = sets[0].features_NF.shape[1], other.features_NF.shape[1]
        if widths[0] != widths[1]:
            raise InputError(
                f"got {widths[0]} features of {sets[0].name} and {widths[1]} of {other.name}, need those of one network; "
                "fix: take the same --features for both"
            )
