"""What videos look like without any network: saturation, contrast, motion, flicker. They show collapse that benchmark totals do not.

Shapes: C channels (1 or 3), T frames, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

_LUMA = (0.299, 0.587, 0.114)
"""BT.601."""

STATISTICS = {
    "saturation": "saturation (HSV)",
    "contrast": "contrast (RMS)",
    "motion": "motion, pixels a frame",
    "flicker": "flicker, |frame difference|",
}
"""Name -> title."""


def video_statistics(video_CTHW: Tensor) -> dict[str, float]:
    """`STATISTICS` of pixels in [-1, 1], float; values outside are clamped, as a picture does. ValueError for another number of channels.

    saturation: mean over pixels of (max - min)/max over RGB, 0 for black. contrast: standard deviation of luma within a frame,
    mean over frames; at most 0.5. motion: sum of |dI/dt| over sum of |grad I| of luma, the speed that brightness constancy gives along
    edges (Horn and Schunck 1981, Eq. 1): it does not fall when contrast does, and less than the speed where a frame moves farther than an
    edge is wide; 0 for one frame or flat ones. flicker: mean
    |frame difference| in [0, 1], which is 1 minus VBench's temporal_flickering; motion raises it too.
    """
    if video_CTHW.shape[0] not in (1, 3):
        raise ValueError(f"got {video_CTHW.shape[0]} channels, need 1 (grey) or 3 (RGB)")
    rgb_CTHW = video_CTHW.detach().float().clamp(-1, 1).add(1).div(2)
    rgb_CTHW = rgb_CTHW.expand(3, -1, -1, -1)
    top_THW = rgb_CTHW.amax(dim=0)
    saturation_THW = (top_THW - rgb_CTHW.amin(dim=0)) / top_THW.clamp(min=1e-6)
    luma_THW = torch.einsum("cthw,c->thw", rgb_CTHW, torch.tensor(_LUMA, device=rgb_CTHW.device))
    frames = luma_THW.shape[0]
    flicker = float(rgb_CTHW.diff(dim=1).abs().mean()) if frames > 1 else 0.0
    return {
        "saturation": float(saturation_THW.mean()),
        "contrast": float(luma_THW.flatten(1).std(dim=1, correction=0).mean()),
        "motion": _motion(luma_THW),
        "flicker": flicker,
    }


def mean_statistics(each: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Means over videos; {} of none."""
    each = list(each)
    return {name: sum(values[name] for values in each) / len(each) for name in (each[0] if each else ())}


def _motion(luma_THW: Tensor) -> float:
    if luma_THW.shape[0] < 2 or min(luma_THW.shape[1:]) < 3:
        return 0.0
    change_THW = luma_THW.diff(dim=0)[:, 1:-1, 1:-1].abs()
    # of the mean of both frames, and over two pixels, so that a small shift gives exactly itself
    middle_THW = (luma_THW[1:] + luma_THW[:-1]) / 2
    down_THW = (middle_THW[:, 2:, 1:-1] - middle_THW[:, :-2, 1:-1]) / 2
    right_THW = (middle_THW[:, 1:-1, 2:] - middle_THW[:, 1:-1, :-2]) / 2
    slope = float(torch.hypot(down_THW, right_THW).sum())
    return float(change_THW.sum()) / slope if slope > 0 else 0.0
