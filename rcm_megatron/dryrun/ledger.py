"""Bytes that live on one kind of device, by what they are and where they were allocated; their peak in each phase, and what held it.

A storage counts once, with its bytes (no allocator's rounding), from the first operation that returns it to its end. What it is can be said
later: until then it is "temporary".
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable
from functools import cache
from types import CodeType

import torch
from torch import Tensor

TEMPORARY, ACTIVATIONS, MESSAGES, BUFFERS = "temporary", "activations", "messages", "buffers"
"""Kinds beside the standing ones: what an operation returned; what autograd keeps; what collectives read or write; what stays from step
to step and is neither weights, gradients, optimizer state nor EMA."""
_PASSING = (TEMPORARY, ACTIVATIONS, MESSAGES)
_PACKAGES = ("/rcm_megatron/", "/rcm_kernels/", "/megatron/core/", "/fsdp/")
_UNTOLD = ("/rcm_megatron/dryrun/", "/rcm_kernels/fused/launcher.py")
"""Paths that say nothing of who allocates."""


class Ledger:
    """Live bytes and their peak since `forget_peak`. ``phase()`` names the moment."""

    def __init__(self, phase: Callable[[], str], *, sites: bool = True) -> None:
        self._phase, self._sites = phase, sites
        self._size: dict[int, int] = {}
        self._owner: dict[int, tuple[str, str]] = {}
        self.live = 0
        self.by_owner: Counter[tuple[str, str]] = Counter()
        """(kind, site) -> bytes."""
        self.forget_peak()

    def forget_peak(self) -> None:
        """From here on peaks are those of what comes."""
        phase = self._phase()
        self._peaks, self._rising = {phase: self.live}, None
        self._held = {phase: dict(self.by_owner)}

    @property
    def peak(self) -> int:
        """Most bytes that lived at once."""
        return max(self._peaks.values())

    def held_at_peaks(self) -> dict[str, dict[tuple[str, str], int]]:
        """Phase -> (kind, site) -> bytes, when most lived in that phase."""
        self._note_peak()
        return self._held

    # ---- storages

    def knows(self, storage: torch.UntypedStorage) -> bool:
        return storage._cdata in self._size

    def meet(self, storage: torch.UntypedStorage, *, size: int) -> None:
        """Count ``storage`` from now on, with ``size`` bytes."""
        key = storage._cdata
        self._size[key], self._owner[key] = size, (TEMPORARY, self._site())
        weakref.finalize(storage, self._release, key)
        self._add(key, size)

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Count it as large as it is now."""
        key, size = storage._cdata, storage.nbytes()
        change, self._size[key] = size - self._size[key], size
        self._add(key, change)

    def tag(self, tensor: Tensor, kind: str, *, passing: bool = False) -> None:
        """The storage of ``tensor`` is of that kind; with ``passing`` only if nothing better was known."""
        key = tensor.untyped_storage()._cdata
        if key not in self._size:
            return
        old, site = self._owner[key]
        if old == kind or (passing and old != TEMPORARY):
            return
        self._move(key, kind, site)

    def settle(self) -> None:
        """What passed and is still there stays: buffers."""
        for key, (kind, site) in list(self._owner.items()):
            if kind in _PASSING:
                self._move(key, BUFFERS, site)

    def by_kind(self) -> dict[str, int]:
        """Live bytes of each kind that has any."""
        total: Counter[str] = Counter()
        for (kind, _), size in self.by_owner.items():
            total[kind] += size
        return dict(total)

    # ---- bookkeeping

    def _move(self, key: int, kind: str, site: str) -> None:
        size, old = self._size[key], self._owner[key]
        self.by_owner[old] -= size
        if not self.by_owner[old]:
            del self.by_owner[old]
        self._owner[key] = (kind, site)
        self.by_owner[kind, site] += size

    def _add(self, key: int, change: int) -> None:
        if not change:
            return
        phase = self._phase()
        if change < 0 or phase != self._rising:
            self._note_peak()
        owner = self._owner[key]
        self.live += change
        self.by_owner[owner] += change
        if not self.by_owner[owner]:
            del self.by_owner[owner]
        if change > 0 and self.live > self._peaks.get(phase, -1):
            self._peaks[phase], self._rising = self.live, phase

    def _note_peak(self) -> None:
        """What holds a peak is looked up once it is over, not at each step on the way up."""
        if self._rising is not None:
            self._held[self._rising], self._rising = dict(self.by_owner), None

    def _release(self, key: int) -> None:
        self._add(key, -self._size[key])
        del self._size[key], self._owner[key]

    def _site(self) -> str:
        if not self._sites:
            return ""
        frame = sys._getframe(2)
        while frame is not None:
            place = _place(frame.f_code)
            if place is not None:
                return f"{place[0]}:{frame.f_lineno} {place[1]}"
            frame = frame.f_back
        return "elsewhere"


@cache
def _place(code: CodeType) -> tuple[str, str] | None:
    """(path from the package on, function) of code of this program, Megatron or FSDP; None for other code."""
    path = code.co_filename
    found = next((package for package in _PACKAGES if package in path), None)
    return (
        None
        if found is None or any(untold in path for untold in _UNTOLD)
        else (path[path.rindex(found) + 1 :], code.co_name)
    )
