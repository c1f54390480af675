"""Where optimizer state and gradients are while they are not used: on the host, or freed.

Adam's state keeps its tensor objects and gives up their storage, so that the EMA, the checkpoints and Megatron's optimizer, which all
hold references, find it back in place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Protocol

import torch
from megatron.core.distributed.data_parallel_base import _BaseDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from rcm_megatron.config import ConfigError, RunConfig
from rcm_megatron.parallel.optimizer_shards import gradient_buffers, owned_shards
from rcm_megatron.platform.device import this_device


class Trained(Protocol):
    """A trained network, as far as its memory goes."""

    chunks: Sequence[_BaseDataParallel]
    optimizer: MegatronOptimizer


def check_memory(run: RunConfig, *, has_gpu: bool) -> None:
    """Raise ConfigError for policies that this machine cannot follow; before any weight is read."""
    if has_gpu:
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

    Their tensors stay what they are, without storage: read them inside alone. Main parameters that are the weights themselves (fp32 ones,
    and those of a network in pieces, which every pass gathers) stay where they are. Copies are ordered by the current stream, so none
    waits for the device.
    """

    def __init__(self, optimizer: MegatronOptimizer) -> None:
        self._optimizer = optimizer
        self._host: list[Tensor] = []
        self._state: list[Tensor] = []
        """Of what was put away, the bytes."""
        self._depth = 0

    def put_away(self) -> None:
        """Copy the state to the host and free it on the device."""
        self._state = [tensor.detach().view(torch.uint8) for tensor in _state_of(self._optimizer)]
        assert all(state.numel() == state.untyped_storage().nbytes() for state in self._state), "a part of a storage"
        if [copy.numel() for copy in self._host] != [state.numel() for state in self._state]:
            pinned = this_device().type == "cuda"
            self._host = [torch.empty(s.numel(), dtype=torch.uint8, pin_memory=pinned) for s in self._state]
        for copy, state in zip(self._host, self._state, strict=True):
            copy.copy_(state, non_blocking=True)
            state.untyped_storage().resize_(0)

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
        for copy, state in zip(self._host, self._state, strict=True):
            state.untyped_storage().resize_(copy.numel())
            state.copy_(copy, non_blocking=True)


def _state_of(optimizer: MegatronOptimizer) -> Iterator[Tensor]:
    """Adam's moments and the main parameters that are not the weights themselves: each is the whole of its storage."""
    for shard in owned_shards(optimizer):
        if not shard.main_is_weight:
            yield shard.main
        yield from shard.adam_state().values()


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
        return (buffer for chunk in self._trained[role].chunks for buffer in gradient_buffers(chunk))

    @contextmanager
    def state(self, *roles: str) -> Iterator[None]:
        """Optimizer state of the networks ``roles`` may be read and written inside; by default that of all."""
        with ExitStack() as stack:
            for role in roles or tuple(self._offloads):
                if role in self._offloads:
                    stack.enter_context(self._offloads[role].resident())
            yield
