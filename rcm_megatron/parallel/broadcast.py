"""Work that one rank does for all: loading an 11 GB text encoder, reading a file."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def computed_once(compute: Callable[[], Tensor], *, device: torch.device, group: ProcessGroup | None = None) -> Tensor:
    """``compute()`` on every rank of ``group`` (default: all), called on its first rank alone; the result is on the CPU.

    ``device`` is where the group's backend communicates. An exception of the first rank is raised on all: itself if it is a
    ValueError, else as a RuntimeError that quotes it. Without a process group this is ``compute()``.
    """
    if not dist.is_initialized():
        return compute().cpu()
    group = dist.group.WORLD if group is None else group
    result, failure, header = None, None, [None]
    if group.rank() == 0:
        try:
            result = compute().cpu().contiguous()
            header = [(result.dtype, result.shape)]
        except Exception as error:  # whatever it is, the other ranks wait for it
            failure = error
            header = [error if isinstance(error, ValueError) else RuntimeError(f"first rank: {error!r}")]
    dist.broadcast_object_list(header, group_src=0, group=group, device=device)
    if isinstance(header[0], Exception):
        raise failure or header[0]
    dtype, shape = header[0]
    # As bytes: any dtype over any backend.
    data = torch.empty(shape.numel() * dtype.itemsize, dtype=torch.uint8, device=device)
    if result is not None:
        data.copy_(result.flatten().view(torch.uint8))
    dist.broadcast(data, group_src=0, group=group)
    return result if result is not None else data.cpu().view(dtype).reshape(shape)
