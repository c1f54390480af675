"""Which implementation of an operation runs: the one that was ordered, or the first of a list that can; settled and logged once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

import torch

from rcm_kernels.gpu import kind_of

_logger = logging.getLogger(__name__)
_FAILURES = (ImportError, AttributeError, RuntimeError, TypeError)
"""What a loader raises where its implementation cannot run, or is not the one known here."""

T = TypeVar("T")
Kind = tuple[str, torch.dtype, int | None]
"""(device type, dtype, head dim) of a tensor; the head dim is None for operations that do not ask."""


class Choice(Generic[T]):
    """The implementations of one operation, and which of them this process runs for tensors of each kind.

    `loaders`: name -> what imports, checks and returns it. `candidates`: of a kind (three arguments), the names to be tried, the best
    first; the last always loads, and that the others do not is a warning where it is `slow`."""

    def __init__(
        self,
        what: str,
        loaders: Mapping[str, Callable[[], T]],
        candidates: Callable[..., Sequence[str]],
        *,
        slow: str,
    ) -> None:
        self.what, self.loaders = what, loaders
        self._candidates, self._slow = candidates, slow
        self._ordered: str | None = None
        self._loaded: dict[str, T] = {}
        self._settled: dict[Kind, tuple[str, T]] = {}

    def select(self, name: str) -> None:
        """Order one implementation for this process; "auto" undoes it. It is then given everything: there is no silent fallback.

        Raises ValueError for an unknown name, and for one that cannot run."""
        if name != "auto" and name not in self.loaders:
            raise ValueError(
                f"got {self.what} backend {name!r}; need one of auto, {', '.join(self.loaders)}; "
                "fix: set one of these, 'auto' to choose by device"
            )
        if name != "auto":
            self.load(name)
        self._ordered = None if name == "auto" else name
        self.reconsider()

    def reconsider(self) -> None:
        """Settle anew what is asked for from now on, for `candidates` gives other answers."""
        self._settled.clear()

    def provide(self, name: str, implementation: T) -> None:
        """Take `implementation` under that name, unchecked: what would run on a GPU that is not there (`gpu.stand_in`)."""
        self._loaded[name] = implementation
        self.reconsider()

    def load(self, name: str) -> T:
        """The implementation of that name. Raises ValueError where it cannot run."""
        if name not in self._loaded:
            try:
                self._loaded[name] = self.loaders[name]()
            except _FAILURES as error:
                raise ValueError(
                    f"got {self.what} backend {name!r}, which cannot run here ({error}); need the package and the device "
                    "that it takes; fix: install it or choose 'auto'"
                ) from error
        return self._loaded[name]

    def settle(self, device: str, dtype: torch.dtype, head_dim: int | None = None) -> tuple[str, T]:
        """(name, implementation) for tensors of this kind; decided and logged once."""
        kind = kind_of(device), dtype, head_dim
        if kind not in self._settled:
            self._settled[kind] = self.decide(*kind)
        return self._settled[kind]

    def decide(self, device: str, dtype: torch.dtype, head_dim: int | None = None) -> tuple[str, T]:
        """What `settle` keeps. Raises ValueError where what was ordered cannot run."""
        refused = []
        of_head_dim = "" if head_dim is None else f", head dim {head_dim}"
        for name in [self._ordered] if self._ordered else self._candidates(device, dtype, head_dim):
            try:
                implementation = self.load(name)
            except ValueError as error:
                if self._ordered:
                    raise
                refused.append(f"{name}: {error.__cause__}")
                continue
            _logger.info("%s backend on %s, %s%s: %s", self.what, device, dtype, of_head_dim, name)
            if refused:
                level = logging.WARNING if name == self._slow else logging.INFO
                others = "; ".join(refused)
                _logger.log(level, "%s: %s is taken because others cannot run: %s", self.what, name, others)
            return name, implementation
        raise AssertionError(f"{self.what}: the last candidate always loads")
