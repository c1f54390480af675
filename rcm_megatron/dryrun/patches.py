"""What has no seam in PyTorch and is replaced for a dry run, each with its reason. Nothing of it touches a run with memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._python_dispatch import _disable_current_modes


def install() -> None:
    """Replace them for the rest of the process."""
    dist.all_gather_object = _all_gather_object
    DeviceMesh.from_group = staticmethod(_with_real_numbers(DeviceMesh.from_group))


def _all_gather_object(found: list[Any], value: Any, group: dist.ProcessGroup | None = None) -> None:
    """The fake group sends nothing, and pickles of zeros cannot be read: every rank has what this one has."""
    found[:] = [value] * len(found)


def _with_real_numbers(from_group: Callable[..., DeviceMesh]) -> Callable[..., DeviceMesh]:
    """FSDP2 asks a mesh's tensor of ranks where this rank stands in it, and fake tensors have no numbers."""

    def build(group: dist.ProcessGroup | Sequence[dist.ProcessGroup], *args: Any, **kwargs: Any) -> DeviceMesh:
        with _disable_current_modes():
            return from_group(group, *args, **kwargs)

    return build
