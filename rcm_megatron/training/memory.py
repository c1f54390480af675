"""Where weights, optimizer state and gradients are while they are not used (MemoryConfig): sharded, on the host, or freed.

The teacher's weights go through PyTorch's FSDP2, which needs no gradient of them. Adam's state keeps its tensor objects and gives up
their storage, so that the EMA, the checkpoints and Megatron's optimizer, which all hold references, find it back in place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

from rcm_megatron.config import ConfigError, RunConfig
from rcm_megatron.models.dit import DiffusionTransformer
from rcm_megatron.parallel.optimizer_shards import owned_shards
from rcm_megatron.platform.device import this_device


def check_memory(run: RunConfig, *, has_cuda: bool) -> None:
    """Raise ConfigError for policies that this machine or this run cannot follow; before any weight is read."""
    memory, problems = run.memory, []
    needs_device = [f"memory.offload_optimizer={list(memory.offload_optimizer)}"] if memory.offload_optimizer else []
    if memory.teacher_weights == "offloaded":
        needs_device.append("memory.teacher_weights=offloaded")
    if needs_device and not has_cuda:
        problems.append(
            f"got {' and '.join(needs_device)} on a CPU, whose memory is the host's; need a CUDA device; fix: "
            "memory.teacher_weights=sharded or resident, memory.offload_optimizer=[]"
        )
    if "fake_score" in memory.offload_optimizer and not run.needs_fake_score:
        problems.append(
            "got fake_score in memory.offload_optimizer, but no stage has a DMD weight; need a network that this run trains; fix: "
            f"memory.offload_optimizer={[name for name in memory.offload_optimizer if name != 'fake_score']}"
        )
    if problems:
        raise ConfigError("\n".join(problems))


# ---- the teacher's weights


def shard_weights(
    chunks: Sequence[DiffusionTransformer], *, group: ProcessGroup, offload: bool = False
) -> list[DiffusionTransformer]:
    """Leave on each rank of ``group`` its part of every frozen parameter; a forward gathers them block by block.

    The embedders and the head are gathered for the whole of a chunk's forward. On CUDA the next block is gathered on a stream of its own
    while this one computes. ``offload``: the parts wait in pinned host memory. All ranks of the group must run the same passes.
    """
    if group.size() == 1 and not offload:
        return list(chunks)
    mesh = DeviceMesh.from_group(group, this_device().type)
    policy = CPUOffloadPolicy() if offload else OffloadPolicy()
    for chunk in chunks:
        for module in (*chunk.blocks.values(), chunk):
            fully_shard(module, mesh=mesh, reshard_after_forward=True, offload_policy=policy)
    return list(chunks)


# ---- optimizer state and gradients


class OptimizerOffload:
    """Adam's moments and the fp32 main parameters of one optimizer, on the host except within :meth:`resident`.

    Their tensors stay what they are, without storage: read them inside alone. Main parameters that are views of fp32 model parameters stay
    where they are. Copies are ordered by the current stream, so none waits for the device.
    """

    def __init__(self, optimizer: MegatronOptimizer) -> None:
        self._optimizer = optimizer
        self._host: list[Tensor] = []
        self._storages: list[torch.UntypedStorage] = []
        self._depth = 0

    @property
    def host_bytes(self) -> int:
        """Size of the copies on the host."""
        return sum(copy.numel() for copy in self._host)

    def put_away(self) -> None:
        """Copy the state to the host and free it on the device."""
        self._storages = list(_state_storages(self._optimizer))
        if [copy.numel() for copy in self._host] != [storage.nbytes() for storage in self._storages]:
            pinned = torch.cuda.is_available()
            self._host = [torch.empty(s.nbytes(), dtype=torch.uint8, pin_memory=pinned) for s in self._storages]
        for copy, storage in zip(self._host, self._storages, strict=True):
            copy.copy_(_bytes_of(storage), non_blocking=True)
            storage.resize_(0)

    @contextmanager
    def resident(self) -> Iterator[None]:
        """The state is on the device inside. Contexts may nest; the outermost one copies."""
        if self._depth == 0:
            self._bring_back()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self.put_away()

    def _bring_back(self) -> None:
        for copy, storage in zip(self._host, self._storages, strict=True):
            storage.resize_(copy.numel())
            _bytes_of(storage).copy_(copy, non_blocking=True)


def _state_storages(optimizer: MegatronOptimizer) -> Iterator[torch.UntypedStorage]:
    """Storages of Adam's moments and of the main parameters that are not views of the model's."""
    for shard in owned_shards(optimizer):
        main = shard.main.untyped_storage()
        if main.data_ptr() != shard.parameter.untyped_storage().data_ptr():
            yield main
        for moment in shard.adam_state().values():
            yield moment.untyped_storage()


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


class Residency:
    """What of the trained networks is on the device while a step trains one of them.

    Build it when optimizers, EMA and loaded checkpoint are in place. Before a step's first backward call :meth:`begin_step`; read or
    write optimizer state inside :meth:`state` alone.
    """

    def __init__(
        self,
        trained: Mapping[str, Sequence[DistributedDataParallel]],
        optimizers: Mapping[str, MegatronOptimizer],
        *,
        offload: Sequence[str] = (),
        free_idle_gradients: bool = False,
    ) -> None:
        self._trained, self._free_idle = trained, free_idle_gradients
        self._offloads = {name: OptimizerOffload(optimizers[name]) for name in offload}
        for waiting in self._offloads.values():
            waiting.put_away()
        if free_idle_gradients:
            self._free_gradients(trained)

    def begin_step(self, name: str) -> None:
        """The step trains ``name``: with ``free_idle_gradients`` its gradient buffers are the only ones. Zero them before the backward."""
        if not self._free_idle:
            return
        self._free_gradients(other for other in self._trained if other != name)
        for gradients in self._gradients(name):
            gradients.untyped_storage().resize_(gradients.numel() * gradients.element_size())

    def _free_gradients(self, names: Iterable[str]) -> None:
        """Megatron's buffers stay tensors without storage, and so do the parameters' views of them (``main_grad``)."""
        for gradients in (gradients for name in names for gradients in self._gradients(name)):
            gradients.untyped_storage().resize_(0)

    def _gradients(self, name: str) -> Iterator[Tensor]:
        return (buffer.grad_data for chunk in self._trained[name] for buffer in chunk.buffers)

    @contextmanager
    def state(self, *names: str) -> Iterator[None]:
        """Optimizer state of the networks ``names`` may be read and written inside; by default that of all."""
        with ExitStack() as stack:
            for name in names or tuple(self._offloads):
                if name in self._offloads:
                    stack.enter_context(self._offloads[name].resident())
            yield
