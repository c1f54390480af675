"""Sees every operation of PyTorch that runs inside it, fake or real: what it allocates, computes and sends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_iter

from rcm_megatron.dryrun.counts import Counts, Groups
from rcm_megatron.dryrun.ledger import ACTIVATIONS, MESSAGES, Ledger
from rcm_megatron.runtime.timers import Timers

_DEVICE = torch.ops.prim.device.default


def device_of(tensor: Tensor) -> torch.device:
    """The device of a tensor; of a fake one without an operation, of which these questions would be half."""
    return getattr(tensor, "fake_device", None) or tensor.device


class Meter(TorchDispatchMode):
    """Ledgers of the device's memory and, where that is another, of the host's; counts of the rest. Enter it before anything is built."""

    def __init__(self, groups: Groups, *, device_type: str, sites: bool = True) -> None:
        super().__init__()
        self._groups, self._timers = groups, None
        self.device = Ledger(self.phase, sites=sites)
        self.host = self.device if device_type == "cpu" else Ledger(self.phase, sites=False)
        self._ledgers = {device_type: self.device, "cpu": self.host}
        self.restart()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """As in `world.Memoryless`."""
        return False

    def phase(self) -> str:
        """The phase that is open in the timers of `follow`."""
        return "build" if self._timers is None else self._timers.current

    def follow(self, timers: Timers) -> None:
        """From here on phases are those of ``timers``."""
        self._timers = timers

    def restart(self) -> None:
        """Count anew, and look for peaks anew."""
        self.counts = Counts(self.phase, self._groups)
        for ledger in self._ledgers.values():
            ledger.forget_peak()

    @contextmanager
    def noting_activations(self) -> Iterator[None]:
        """Inside, what autograd saves is known as activations."""

        def pack(saved: Tensor) -> Tensor:
            ledger = self._ledgers.get(device_of(saved).type)
            if ledger is not None:
                ledger.tag(saved, ACTIVATIONS, passing=True)
            return saved

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            yield

    def __enter__(self) -> Self:
        """Storages that are resized go by no operator."""
        resize = torch.UntypedStorage.resize_

        def tracked(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            resize(storage, size)
            for ledger in {id(ledger): ledger for ledger in self._ledgers.values()}.values():
                if ledger.knows(storage):
                    ledger.resized(storage)
            return storage

        self._restore = partial(setattr, torch.UntypedStorage, "resize_", resize)
        torch.UntypedStorage.resize_ = tracked
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        self._restore()
        super().__exit__(*exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _DEVICE:
            return device_of(args[0])
        if func.namespace == "c10d":
            self.counts.collective(func, args)
            self._note_messages(args)
            return func(*args, **kwargs)
        output = func(*args, **kwargs)
        for value in output if isinstance(output, tuple | list) else (output,):
            if isinstance(value, Tensor):
                self._meet(value)
        self.counts.operation(func, args, kwargs, output)
        return output

    def _meet(self, value: Tensor) -> None:
        ledger = self._ledgers.get(device_of(value).type)
        # A DTensor's own storage is as large as the whole and has no bytes.
        if ledger is None or is_traceable_wrapper_subclass(value):
            return
        storage = value.untyped_storage()
        if not ledger.knows(storage):
            ledger.meet(storage, size=storage.nbytes())

    def _note_messages(self, args: Any) -> None:
        for value in tree_iter(args):
            if isinstance(value, Tensor):
                self._ledgers.get(device_of(value).type, self.host).tag(value, MESSAGES, passing=True)
