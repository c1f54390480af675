"""Where the seconds of a step go, by phase: one clock that every moment of the step belongs to exactly one phase of.

Megatron-Core's schedules, gradient reduction and optimizer call ``config.timers(name, log_level).start() ... .stop()``; :class:`Timers` is
that callable, so forward, backward and the messages between stages are told apart by Megatron itself.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from torch import nn

from rcm_megatron.parallel.pipeline import unwrapped
from rcm_megatron.platform.device import this_device

PHASES = {
    "data": "waiting for the loader",
    "backward": "backward of the trained network, recomputation included",
    "stages": "between pipeline stages: sends, receives, the outputs' broadcast, and waiting for other stages (the bubble)",
    "reduce": "gradient reduction that no backward hid: over dp*cp, over tp, over stages",
    "optimizer": "gradient norm, AdamW, EMA",
    "gather": "updated parameters gathered over dp*cp",
    "preview": "sample videos",
    "other": "the rest: batches, noise and arithmetic on latents between passes, sums of metrics",
}
"""Name -> what is in it; the objectives' forward passes come on top (`Objective.phases`). They exclude each other and add up to the
step. Collectives of tensor and context parallelism, and gathered or
copied weights, are inside the pass that waits for them."""

COMMUNICATION = ("stages", "reduce", "gather")
"""Phases that would not exist on one rank."""

_MEGATRON = {"forward-backward": "stages", "backward-compute": "backward", "params-all-gather": "gather"}
"""Megatron's timers that begin another phase. ``forward-compute`` is the phase of the pass around the schedule; any other goes on with
the phase that is open: what a schedule does outside its compute timers are messages and waiting."""


class Timers:
    """The phases of the step since :meth:`restart`.

    A phase ends when another begins inside it and goes on after that. On CUDA the times are those of the current stream, taken by events
    that are read in :meth:`pop`: nothing waits for the device in between. Megatron's barriers are not made.
    """

    def __init__(self, passes: Iterable[str] = ()) -> None:
        """``passes``: the phases of forward passes."""
        self.phases = tuple(dict.fromkeys(("data", *passes, *PHASES)))
        """In one order on all ranks."""
        self._spare: list[torch.cuda.Event] = []
        self._marks: list[tuple[str, Any]] = []
        self._open = ["other"]
        self._start = self._now()
        self._ranges: list[torch.profiler.record_function] | None = None
        """Of the open phases in a trace; None: there is none."""

    @contextmanager
    def annotated(self) -> Iterator[None]:
        """Inside, phases are ranges of PyTorch's profiler."""
        self._ranges = []
        try:
            yield
        finally:
            self._close_ranges(0)
            self._ranges = None

    def restart(self) -> None:
        """Begin a step; forget what was not popped."""
        self._recycle()
        self._open, self._start = ["other"], self._now()

    @property
    def current(self) -> str:
        """The phase that is open."""
        return self._open[-1]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """``with timers.phase("rollout"): …`` for a name of :attr:`phases`. Raises KeyError for another."""
        if name not in self.phases:
            raise KeyError(f"got phase {name!r}; need one of {', '.join(self.phases)}")
        depth = len(self._open)
        self._enter(name)
        try:
            yield
        finally:
            self._leave(depth)

    def __call__(self, name: str, log_level: int | None = None) -> "_MegatronTimer":
        """Megatron's timer ``name``."""
        return _MegatronTimer(self, name)

    def pop(self) -> dict[str, float]:
        """Seconds of every phase since the last :meth:`restart`, in the order of :attr:`phases`; then restarts.

        On CUDA it waits for the device."""
        self._marks.append((self._open[-1], self._now()))
        seconds, before = dict.fromkeys(self.phases, 0.0), self._start
        if torch.cuda.is_available():
            self._marks[-1][1].synchronize()
        for phase, stamp in self._marks:
            seconds[phase] += _seconds_between(before, stamp)
            before = stamp
        self.restart()
        return seconds

    def _enter(self, phase: str) -> None:
        self._marks.append((self._open[-1], self._now()))
        self._open.append(phase)
        if self._ranges is not None:
            self._ranges.append(torch.profiler.record_function(f"phase {phase}"))
            self._ranges[-1].__enter__()

    def _leave(self, depth: int) -> None:
        """Close the phases above ``depth``: after an exception more than one may be open."""
        self._marks.append((self._open[-1], self._now()))
        del self._open[max(depth, 1) :]
        self._close_ranges(max(depth, 1) - 1)

    def _close_ranges(self, depth: int) -> None:
        while self._ranges is not None and len(self._ranges) > depth:
            self._ranges.pop().__exit__(None, None, None)

    def _phase_of(self, name: str) -> str:
        if name == "forward-compute":
            return next(phase for phase in reversed(self._open) if phase != "stages")
        return _MEGATRON.get(name, self._open[-1])

    def _now(self) -> Any:
        if not torch.cuda.is_available():
            return perf_counter()
        event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _recycle(self) -> None:
        if torch.cuda.is_available():
            self._spare += [self._start, *(stamp for _, stamp in self._marks)]
        self._marks = []


class _MegatronTimer:
    """What Megatron starts and stops."""

    def __init__(self, timers: Timers, name: str) -> None:
        self._timers, self._name = timers, name

    def start(self, barrier: bool = False) -> None:
        self._timers._enter(self._timers._phase_of(self._name))

    def stop(self, barrier: bool = False) -> None:
        self._timers._leave(len(self._timers._open) - 1)


def _seconds_between(start: Any, end: Any) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3


def attach(
    timers: Timers | None, networks: Sequence[Sequence[nn.Module] | None], optimizers: Sequence[MegatronOptimizer]
) -> None:
    """Let the passes of ``networks`` (lists of chunks) and ``optimizers`` report to ``timers``; None detaches them."""
    for chunk in (chunk for chunks in networks for chunk in chunks or ()):
        unwrapped(chunk).config.timers = timers
    for part in (part for optimizer in optimizers for part in optimizer.chained_optimizers):
        part.config.timers = timers


def step_seconds(seconds: dict[str, float]) -> dict[str, float]:
    """Metrics of a step from what :meth:`Timers.pop` gave on this rank; call it on all ranks.

    ``seconds/<phase>`` are this rank's, without the phases that it did not have; ``seconds/communication`` and ``seconds/step`` are
    their sums. With more than one rank ``seconds/max/<phase>`` is the slowest rank's: a stage or a node that others wait for.
    """
    present = {name: value for name, value in seconds.items() if value > 0}
    communication = sum(seconds[name] for name in COMMUNICATION)
    named = present | {"communication": communication, "step": sum(seconds.values())}
    if dist.get_world_size() > 1:
        slowest = torch.tensor(list(seconds.values()), dtype=torch.float64, device=this_device())
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        of_all = zip(seconds, slowest.tolist(), strict=True)
        named |= {f"max/{name}": value for name, value in of_all if value > 0}
    return {f"seconds/{name}": value for name, value in named.items()}
