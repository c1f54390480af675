"""Where optimizer state and gradients are while they are not used: on the host, or freed.

Adam's state keeps its tensor objects and gives up their storage, so that the EMA, the checkpoints and Megatron's optimizer, which all
hold references, find it back in place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Protocol

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from rcm_megatron.config import ConfigError, RunConfig
from rcm_megatron.parallel.optimizer_shards import owned_shards


class Trained(Protocol):
    """A trained network, as far as its memory goes."""

    chunks: Sequence[DistributedDataParallel]
    optimizer: MegatronOptimizer


def check_memory(run: RunConfig, *, has_cuda: bool) -> None:
    """Raise ConfigError for policies that this machine cannot follow; before any weight is read."""
    if has_cuda:
        return
    asked, instead = [], []
    for role in run.roles:
        settings = run.networks[role]
        if settings.weights == "offloaded":
            asked.append(f"networks.{role}.weights=offloaded")
            instead.append(f"networks.{role}.weights=sharded")
        if settings.offload_optimizer:
            asked.append(f"networks.{role}.offload_optimizer=true")
            instead.append(f"networks.{role}.offload_optimizer=false")
    if asked:
        raise ConfigError(
            f"got {' and '.join(asked)} on a CPU, whose memory is the host's; need a CUDA device; fix: {' '.join(instead)}"
        )


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

    Build it when optimizers and EMA are in place. Before a step's first backward call :meth:`begin_step`; read or write optimizer state
    inside :meth:`state` alone.
    """

    def __init__(
        self, trained: Mapping[str, Trained], *, offload: Sequence[str] = (), free_idle_gradients: bool = False
    ) -> None:
        self._trained, self._free_idle = trained, free_idle_gradients
        self._offloads = {role: OptimizerOffload(trained[role].optimizer) for role in offload}
        for waiting in self._offloads.values():
            waiting.put_away()
        if free_idle_gradients:
            self._free_gradients(trained)

    def begin_step(self, role: str) -> None:
        """The step trains ``role``: with ``free_idle_gradients`` its gradient buffers are the only ones. Zero them before the backward."""
        if not self._free_idle:
            return
        self._free_gradients(other for other in self._trained if other != role)
        for gradients in self._gradients(role):
            gradients.untyped_storage().resize_(gradients.numel() * gradients.element_size())

    def _free_gradients(self, roles: Iterable[str]) -> None:
        """Megatron's buffers stay tensors without storage, and so do the parameters' views of them (``main_grad``)."""
        for gradients in (gradients for role in roles for gradients in self._gradients(role)):
            gradients.untyped_storage().resize_(0)

    def _gradients(self, role: str) -> Iterator[Tensor]:
        return (buffer.grad_data for chunk in self._trained[role].chunks for buffer in chunk.buffers)

    @contextmanager
    def state(self, *roles: str) -> Iterator[None]:
        """Optimizer state of the networks ``roles`` may be read and written inside; by default that of all."""
        with ExitStack() as stack:
            for role in roles or tuple(self._offloads):
                if role in self._offloads:
                    stack.enter_context(self._offloads[role].resident())
            yield
