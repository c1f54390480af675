"""What a run holds on a rank from step to step, by arithmetic: known before any weight is read."""

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rcm_megatron.config import RunConfig
from rcm_megatron.networks.build import build_network
from rcm_megatron.parallel.groups import ParallelGroups

log = logging.getLogger(__name__)

GRADIENT = MAIN = EMA = 4
MOMENTS = 8
"""Bytes an element: all of them fp32."""


def parameters_of(run: RunConfig, groups: ParallelGroups) -> dict[str, list[nn.Parameter]]:
    """Role -> the parameters of this rank, without memory: shapes and dtypes alone."""
    with FakeTensorMode():
        built = {role: build_network(run, role, groups) for role in run.roles}
    return {role: [p for chunk in chunks for p in chunk.parameters()] for role, chunks in built.items()}


def standing_bytes(run: RunConfig, parameters: Mapping[str, Sequence[nn.Parameter]], *, shards: int) -> dict[str, int]:
    """Device bytes of this rank by what they are. ``parameters``: this rank's of each role; ``shards``: dp*cp.

    Left out are what a step allocates and Megatron's padding of gradients. Parts over dp*cp are means: its ranks' differ a little.
    """
    found, elements = {}, {role: sum(p.numel() for p in parameters[role]) for role in run.roles}
    largest = max(run.trained_roles, key=elements.__getitem__)
    for role in run.roles:
        settings, own = run.networks[role], parameters[role]
        weights = sum(p.numel() * p.element_size() for p in own)
        if role not in run.trained_roles:
            found[role] = {"resident": weights, "sharded": weights // shards, "offloaded": 0}[settings.weights]
            continue
        narrow = sum(p.numel() for p in own if p.dtype != torch.float32)  # fp32 weights are their own main parameters
        found[f"{role} weights"] = weights
        if role == largest or not run.memory.free_idle_gradients:  # else one network's at a time
            found[f"{role} gradients"] = GRADIENT * elements[role]
        state = (MOMENTS * elements[role] + MAIN * narrow) // shards
        found[f"{role} optimizer"] = 0 if settings.offload_optimizer else state
        if settings.ema is not None:
            found[f"{role} EMA"] = EMA * elements[role] // shards
    return found


def log_footprint(run: RunConfig, groups: ParallelGroups, *, world_size: int) -> None:
    """One line of the layout, one of the memory, where somebody reads them."""
    if not log.isEnabledFor(logging.INFO):
        return
    parameters = parameters_of(run, groups)
    found = standing_bytes(run, parameters, shards=groups.dp_cp.size())
    counts = {role: sum(p.numel() for p in own) / 1e6 for role, own in parameters.items()}
    if len(set(counts.values())) == 1:
        sizes = f"{next(iter(counts.values())):.1f} M parameters of a network"
    else:
        sizes = "M parameters of " + ", ".join(f"{role} {count:.1f}" for role, count in counts.items())
    total = sum(found.values())
    unit, divisor = ("GiB", 2**30) if total >= 2**30 else ("MiB", 2**20)
    parts = ", ".join(f"{name} {size / divisor:.2f}" for name, size in found.items())
    log.info("%s; %s on rank 0", run.layout_summary(world_size), sizes)
    log.info("memory of rank 0 between steps: %.2f %s (%s)", total / divisor, unit, parts)
