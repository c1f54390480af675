"""`rcm plan`, and what `rcm check --gpu` says."""

from __future__ import annotations

import json
import os
import shlex
import sys
from dataclasses import replace
from typing import Any

from rcm_megatron.config import ConfigError, ParallelConfig, RunConfig, to_yaml
from rcm_megatron.config.validate import is_valid, problems_of
from rcm_megatron.dryrun.apart import run_apart
from rcm_megatron.dryrun.command import check_experts, ranks_of, simulate_all
from rcm_megatron.files import write_atomically
from rcm_megatron.planner.candidates import Policies, with_layout
from rcm_megatron.planner.cost import Schedule, cost_of
from rcm_megatron.planner.hardware import Hardware, hardware_of
from rcm_megatron.planner.inventory import read_inventory
from rcm_megatron.planner.memory import GIB, peak_of
from rcm_megatron.planner.question import asked
from rcm_megatron.planner.report import overrides_of, report_of, to_text
from rcm_megatron.planner.search import Option, search, smallest_world
from rcm_megatron.planner.shapes import Inventories, Shapes
from rcm_megatron.requests import DryRunRequest, PlanRequest

NOTHING_FITS = 3
"""Exit status."""


def plan(run: RunConfig, request: PlanRequest) -> int:
    """Print the report, and write the files that are asked for. Raises ConfigError for hardware that is not known, for a run that trains a
    LoRA, and where no layout is legal."""
    hardware = hardware_of(request.gpu)
    if adapted := [role for role in run.trained_roles if run.trains_lora(role)]:
        raise ConfigError(
            f"networks.{adapted[0]}.lora is given, and the planner's formulas are of networks that train whole; need lora=null, or "
            "`rcm dryrun` of a layout with the LoRA"
        )
    inventories = inventories_of(run)
    found = search(run, request.gpus, inventories, hardware)
    if not (found.fitting or found.refused):
        raise ConfigError("\n".join(problems_of(with_layout(run, ParallelConfig()), request.gpus)))
    own = _as_configured(run, request.gpus, inventories, hardware)
    if request.confirm and found.fitting:
        found = replace(found, fitting=_confirmed(found.fitting, request, hardware))
    report = report_of(run, request.gpus, hardware, found, own=own, top=request.top)
    print(to_text(report))
    if request.json is not None:
        write_atomically(request.json, (json.dumps(report, indent=1) + "\n").encode())
    if not found.fitting:
        _say_what_would_fit(run, request, inventories, hardware)
        return NOTHING_FITS
    best = found.fitting[0]
    if request.picture is not None:
        from rcm_megatron.planner.picture import draw

        draw(report, request.picture)
    nodes = -(-request.gpus // hardware.gpus_per_node)
    if request.write is not None:
        write_atomically(request.write, to_yaml(best.run).encode())
        command = f"sbatch --nodes={nodes} launch/slurm/train.sbatch {shlex.quote(str(request.write))}"
    else:
        command = f"sbatch --nodes={nodes} launch/slurm/train.sbatch CONFIG {shlex.join([*asked(run, request), *overrides_of(best)])}"
    print(f"\nto run 1: {command}")
    return 0


def inventories_of(run: RunConfig) -> Inventories:
    """Of every network; those of one architecture are looked at once."""
    models = {role: run.model_of(role) for role in run.roles}
    first = {role: next(other for other in run.roles if models[other] == models[role]) for role in run.roles}
    roles = list(dict.fromkeys(first.values()))
    modules = ("rcm_megatron.dryrun.world", "rcm_megatron.networks.build")
    read = dict(
        zip(roles, run_apart(read_inventory, {role: (run, role) for role in roles}, modules=modules), strict=True)
    )
    return {role: read[first[role]] for role in run.roles}


def say_memory(run: RunConfig, world_size: int, gpu: str) -> None:
    """Print what a run takes of each GPU; a warning on standard error where it is too much. Raises ConfigError for unknown hardware."""
    hardware = hardware_of(gpu)
    inventories = inventories_of(run)
    peak = peak_of(Shapes(run, world_size), inventories)
    total, usable = peak.total / GIB, hardware.usable_gib
    parts = ", ".join(
        f"{name} {size / GIB:.1f}" for name, size in (peak.standing | {peak.phase: peak.working}).items() if size
    )
    print(
        f"# simulated: {total:.1f} GiB of tensors on the fullest rank of the {usable:.1f} that {hardware.name} has ({parts})"
    )
    if total > usable:
        advice = f"fix: a layout of `rcm plan CONFIG --gpus {world_size} --gpu {shlex.quote(gpu)}`"
        print(f"warning: got {total:.1f} GiB on a GPU, need at most {usable:.1f}; {advice}", file=sys.stderr)


def _as_configured(run: RunConfig, world_size: int, inventories: Inventories, hardware: Hardware) -> Option | None:
    """The configuration's own layout; None where it is not legal on so many GPUs."""
    if not is_valid(run, world_size):
        return None
    shapes = Shapes(run, world_size)
    peak = peak_of(shapes, inventories)
    fits = peak.total <= hardware.usable_gib * GIB
    policies = Policies(
        recompute=run.memory.recompute,
        free_idle_gradients=run.memory.free_idle_gradients,
        frozen_weights=next((run.networks[role].weights for role in shapes.frozen_roles), "resident"),
        trained_weights=next((run.networks[role].weights for role in run.trained_roles), "resident"),
        offload_optimizer=any(run.networks[role].offload_optimizer for role in run.trained_roles),
    )
    return Option(run, policies, peak, cost_of(shapes, inventories, hardware, Schedule.of(run)) if fits else None)


def _confirmed(fitting: list[Option], request: PlanRequest, hardware: Hardware) -> list[Option]:
    """Without those of the fastest that a dry run finds too large, until ``request.confirm`` are confirmed; the rest stays as it is."""
    check_experts(fitting[0].run)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    good: list[Option] = []
    for number, option in enumerate(fitting):
        total = dry_peak(option.run, request.gpus, hardware.gpus_per_node) / GIB
        said, layout = option.peak.total / GIB, " ".join(overrides_of(option)[:1])
        fits = total <= hardware.usable_gib
        verdict = "fits" if fits else "does not fit, and is left out"
        print(f"dry run of {layout}: {total:.2f} GiB ({said:.2f} by formula): {verdict}", flush=True)
        if fits:
            good.append(option)
        if len(good) == request.confirm:
            return [*good, *fitting[number + 1 :]]
    return good


def dry_peak(run: RunConfig, world_size: int, gpus_per_node: int) -> int:
    """Bytes at the peak of the fullest rank that a dry run finds. With rollouts of one step, whose peak is that of longer ones."""
    shortened = replace(run, distillation=replace(run.distillation, max_rollout_steps=1), output_dir=os.devnull)
    request = DryRunRequest(world_size=world_size, gpus_per_node=gpus_per_node)
    found = simulate_all(shortened, ranks_of(shortened, request), request)
    return max(_peak(update) for numbers in found for update in numbers["updates"].values())


def _peak(update: dict[str, Any]) -> int:
    return max(sum(owners.values()) for owners in update["held"].values())


def _say_what_would_fit(run: RunConfig, request: PlanRequest, inventories: Inventories, hardware: Hardware) -> None:
    larger = smallest_world(run, request.gpus, inventories, hardware)
    if larger is None:
        print(f"\nnothing fits on up to {request.gpus * 16} of them either")
        return
    gpus, option = larger
    print(f"\n{gpus} of them would do: {shlex.join(overrides_of(option))} takes {option.peak.total / GIB:.1f} GiB")
