"""Wall-clock seconds of the phases of a step."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Timers:
    """Accumulates seconds under a name: ``with timers("scm"): …``; waits for the device at both ends where there is one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = self._now()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - start

    def pop(self) -> dict[str, float]:
        """The seconds so far; starts again from nothing."""
        seconds, self.seconds = self.seconds, {}
        return seconds

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()
