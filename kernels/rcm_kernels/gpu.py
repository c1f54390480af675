"""Which tensors are on a GPU, and of what capability: CUDA's, or those of a device type that stands for one in a dry run."""

from __future__ import annotations

import torch

_stand_ins: dict[str, tuple[int, int]] = {}
"""Device type -> the compute capability of the GPU that it stands for."""


def stand_in(device_type: str, *, capability: tuple[int, int]) -> None:
    """Choose kernels for tensors on ``device_type`` as on a GPU of that capability. They never run: see `launch.instead`."""
    _stand_ins[device_type] = capability


def kind_of(device_type: str) -> str:
    """``device_type``, or "cuda" for one that stands for it."""
    return "cuda" if device_type in _stand_ins else device_type


def capability(device_index: int | None = None) -> tuple[int, int]:
    """Compute capability of a CUDA device, by default the current one, or of what stands for it."""
    if _stand_ins:
        return next(iter(_stand_ins.values()))
    return (
        torch.cuda.get_device_capability() if device_index is None else torch.cuda.get_device_capability(device_index)
    )
