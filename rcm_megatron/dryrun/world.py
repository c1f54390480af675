"""The world of a rank that is alone: its target, a process group that sends nothing, and tensors without memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from rcm_megatron.dryrun import gpu, patches
from rcm_megatron.dryrun.counts import HOST_READS
from rcm_megatron.platform.device import Target, stand_in
from rcm_megatron.platform.megatron import prepare_megatron

aten = torch.ops.aten
Kind = Literal["gpu", "cpu"]
"""Of device: a GPU with the CUDA path's decisions, or the CPU as on Gloo."""
_COALESCED = tuple(
    getattr(torch.ops.c10d, name).default
    for name in ("reduce_scatter_tensor_coalesced_", "allgather_into_tensor_coalesced_", "allreduce_coalesced_")
)
"""Collectives without a fake implementation in PyTorch (2.13)."""


class Memoryless(FakeTensorMode):
    """Operations make shapes alone; what asks for a number gets `stand_in_number`."""

    avoid_device_init = property(lambda self: True)
    """torch.tensor(…, device="gpu") must not touch the device, of which there is none."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """PyTorch wraps a mode in what keeps its compiler away, at 10 microseconds an operation; nothing is compiled here."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in HOST_READS:
            return stand_in_number(args[0]) if func is aten._local_scalar_dense.default else True
        if func in _COALESCED:
            return FakeWork().boxed()
        return self.dispatch(func, types, args, kwargs or {})


def stand_in_number(tensor: Tensor) -> bool | int | float:
    """One, which is finite, true and no NaN: gradients are never refused, and no sample is masked."""
    if tensor.dtype == torch.bool:
        return True
    return 1.0 if tensor.dtype.is_floating_point else 1


def become(rank: int, *, world_size: int, kind: Kind) -> None:
    """Make this process ``rank`` of a job of ``world_size``, for good. Call it once, before anything is built."""
    device = gpu.register() if kind == "gpu" else torch.device("cpu")
    backend = "fake" if kind == "cpu" else f"cpu:fake,{device.type}:fake"
    stand_in(Target(device, backend, has_gpu=kind == "gpu"))
    prepare_megatron()
    patches.install()
    dist.init_process_group(backend, store=FakeStore(), rank=rank, world_size=world_size)


@contextmanager
def without_memory(note_launch: Callable[[Any], None], *, kind: Kind) -> Iterator[None]:
    """Inside, tensors have shapes alone; launches of Triton kernels go to ``note_launch``."""
    if kind == "cpu":
        with Memoryless():
            yield
        return
    from rcm_kernels.launch import instead

    with Memoryless(), instead(note_launch):
        yield
