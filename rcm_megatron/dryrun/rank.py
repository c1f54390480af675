"""One rank, simulated in this process: call `simulate` once in a process, which is that rank for good."""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Callable
from typing import Any

from megatron.core import parallel_state

from rcm_megatron.config import RunConfig
from rcm_megatron.dryrun.counts import Groups
from rcm_megatron.dryrun.driver import Numbers, measure
from rcm_megatron.dryrun.meter import Meter
from rcm_megatron.dryrun.shallow import combined, parts_of
from rcm_megatron.dryrun.surroundings import no_files
from rcm_megatron.dryrun.world import Kind, become, without_memory
from rcm_megatron.parallel.groups import ParallelGroups, initialize_parallel


def simulate(
    run: RunConfig,
    *,
    rank: int,
    world_size: int,
    kind: Kind = "gpu",
    gpus_per_node: int = 8,
    whole: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """What `measure` says of ``rank`` of ``run``, and how it was found. ``whole``: nothing is concluded from shallower runs.

    Raises ConfigError for what this installation cannot build."""
    start = time.perf_counter()
    become(rank, world_size=world_size, kind=kind)
    groups = initialize_parallel(run.parallel)
    parts = [] if whole else parts_of(run, rank=rank, world_size=world_size)
    executed = []
    for number, part in enumerate(parts, start=1):
        where = f"{number}/{len(parts)} " if len(parts) > 1 else ""
        numbers = _executed(part.run, groups, kind, gpus_per_node, lambda line, where=where: progress(where + line))
        executed.append((part.weight, numbers))
    found = combined(executed) if executed else _executed(run, groups, kind, gpus_per_node, progress)
    return found | {
        "rank": rank,
        "stage": groups.pp_rank,
        "concluded_from": len(parts) if len(parts) > 1 else 0,
        "seconds": time.perf_counter() - start,
        "process_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def _executed(
    run: RunConfig, groups: ParallelGroups, kind: Kind, gpus_per_node: int, progress: Callable[[str], None]
) -> Numbers:
    # Megatron keeps a buffer for the life of a process; each part begins without it, as a run does.
    parallel_state.destroy_global_memory_buffer()
    parallel_state._set_global_memory_buffer()
    meter = Meter(Groups(groups, gpus_per_node=gpus_per_node), device_type=kind)
    with without_memory(lambda launch: meter.counts.launch(launch), kind=kind), meter:
        found = measure(run, groups, meter, meets=no_files(), progress=progress)
    gc.collect()
    return found
