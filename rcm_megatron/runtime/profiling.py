"""Traces of a few iterations by PyTorch's profiler, for https://ui.perfetto.dev or chrome://tracing, with the timers' phases in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from rcm_megatron.runtime.timers import Timers

BEFORE = 3
"""Iterations that pass first: kernels are chosen and memory is allocated in them; the profiler warms up in the last."""
MAX_EVENTS = 1_000_000
"""Allocations and frees of which a snapshot of memory tells."""


@contextmanager
def profiled(folder: Path, *, iterations: int, name: str, timers: Timers) -> Iterator[Callable[[], None]]:
    """Inside, call what it gives after each iteration: a trace of ``iterations`` of them, after the first BEFORE, comes into ``folder``.

    ``<name>.json.gz``; on CUDA also ``<name>_memory.pickle``, what the allocator did, for https://pytorch.org/memory_viz. A run that ends
    earlier leaves a trace of those that it made.
    """
    on_cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    steps = schedule(wait=BEFORE - 1, warmup=1, active=iterations, repeat=1)

    def write(profiler: profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(folder / f"{name}.json.gz"))
        if on_cuda:
            torch.cuda.memory._dump_snapshot(str(folder / f"{name}_memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)  # it costs time as long as it goes on

    if on_cuda:
        torch.cuda.memory._record_memory_history(max_entries=MAX_EVENTS)
    with timers.annotated(), profile(activities=activities, schedule=steps, on_trace_ready=write) as profiler:
        yield profiler.step
