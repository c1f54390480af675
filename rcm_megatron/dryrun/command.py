"""`rcm dryrun`: which ranks, each in a process of its own, and what is written of them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rcm_megatron.config import ConfigError, RunConfig
from rcm_megatron.config.roles import low_noise_of
from rcm_megatron.dryrun.apart import run_apart
from rcm_megatron.requests import DryRunRequest


def dry_run(run: RunConfig, request: DryRunRequest) -> None:
    """Print the report, and write the files that are asked for. Raises ConfigError for what cannot be simulated."""
    ranks = ranks_of(run, request)
    check_experts(run)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # nothing of this touches a GPU that is here
    print(f"# simulated, nothing measured: {run.layout_summary(request.world_size)}", flush=True)
    found = simulate_all(replace(run, output_dir=os.devnull), ranks, request)
    from rcm_megatron.dryrun.report import report_of, to_text

    report = report_of(run, request, found)
    print(to_text(report))
    if request.json is not None:
        request.json.write_text(json.dumps(report, indent=1) + "\n")
    if request.picture is not None:
        from rcm_megatron.dryrun.picture import draw

        draw(report, request.picture)


def ranks_of(run: RunConfig, request: DryRunRequest) -> tuple[int, ...]:
    """The rank that is asked for, or the first of each stage that may be the fullest or differs: the first, the last, and those with
    more blocks than the first. A stage between has fewer micro-batches in flight than the first, and no head."""
    if request.rank is not None:
        if not 0 <= request.rank < request.world_size:
            raise ConfigError(
                f"--rank: got {request.rank}, need one of 0 to {request.world_size - 1} (--world-size less 1)"
            )
        return (request.rank,)
    return tuple(stage * (request.world_size // run.parallel.pp) for stage in fullest_stages(run))


def fullest_stages(run: RunConfig) -> list[int]:
    """Pipeline stages that may be the fullest or differ."""
    held = [blocks_of_stage(run, stage) for stage in range(run.parallel.pp)]
    return sorted({0, run.parallel.pp - 1} | {stage for stage, blocks in enumerate(held) if blocks > held[0]})


def blocks_of_stage(run: RunConfig, stage: int) -> int:
    """Of all networks together."""
    total = 0
    for role in run.roles:
        parallel = run.parallel_of(role)
        ranges = parallel.layer_ranges(run.model_of(role).num_layers)
        total += sum(len(layers) for layers in ranges[stage :: parallel.pp])
    return total


def check_experts(run: RunConfig) -> None:
    """Raise ConfigError where a sample's time, a number, decides which network it goes to: simulated samples have no numbers."""
    pairs = [role for role in run.roles if low_noise_of(role) in run.roles]
    if pairs:
        raise ConfigError(
            f"got networks.{low_noise_of(pairs[0])} beside networks.{pairs[0]}; need one network a role, because a sample's time decides "
            "which of two it goes to, and simulated samples have none; fix: dry-run the run with one of the two"
        )


def simulate_all(run: RunConfig, ranks: Sequence[int], request: DryRunRequest) -> list[dict[str, Any]]:
    """What `simulate` says of each of ``ranks``, all at once in processes that share the imports."""
    return run_apart(
        _simulate, {f"rank {rank}": (run, rank, request) for rank in ranks}, modules=("rcm_megatron.dryrun.rank",)
    )


def _simulate(run: RunConfig, rank: int, request: DryRunRequest) -> dict[str, Any]:
    from rcm_megatron.dryrun.rank import simulate

    def progress(line: str) -> None:
        print(f"rank {rank}: {line}", file=sys.stderr, flush=True)

    options = {"world_size": request.world_size, "kind": request.device, "gpus_per_node": request.gpus_per_node}
    return simulate(run, rank=rank, whole=request.whole, progress=progress, **options)
