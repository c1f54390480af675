"""What a run holds on a rank from step to step, by arithmetic: known once one network is built, before any weight is read."""

import logging
from collections.abc import Sequence

import torch
from torch import nn

from rcm_megatron.config import RunConfig

log = logging.getLogger(__name__)

GRADIENT = MAIN = EMA = 4
MOMENTS = 8
"""Bytes an element: all of them fp32."""


def standing_bytes(run: RunConfig, chunks: Sequence[nn.Module], *, shards: int) -> dict[str, int]:
    """Device bytes of this rank by what they are. ``chunks``: its part of one network (all have one shape); ``shards``: dp*cp.

    Left out are what a step allocates and Megatron's padding of gradients. Parts over dp*cp are means: its ranks' differ a little.
    """
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    elements = sum(p.numel() for p in parameters)
    weights = sum(p.numel() * p.element_size() for p in parameters)
    narrow = sum(
        p.numel() for p in parameters if p.dtype != torch.float32
    )  # fp32 weights are their own main parameters
    state = (MOMENTS * elements + MAIN * narrow) // shards
    found = {}
    if run.needs_teacher:
        networks = 1 if run.init.teacher_low_noise is None else 2
        held = {"resident": weights, "sharded": weights // shards, "offloaded": 0}[run.memory.teacher_weights]
        found["teacher"] = networks * held
    trained = ["student", *(["fake_score"] if run.needs_fake_score else [])]
    for name in trained:
        found[f"{name} weights"] = weights
        if name == "student" or not run.memory.free_idle_gradients:
            found[f"{name} gradients"] = GRADIENT * elements
        found[f"{name} optimizer"] = 0 if name in run.memory.offload_optimizer else state
    if run.ema.enabled:
        found["EMA"] = EMA * elements // shards
    return found


def log_footprint(run: RunConfig, chunks: Sequence[nn.Module], *, world_size: int, shards: int) -> None:
    """One line of the layout, one of the memory."""
    found = standing_bytes(run, chunks, shards=shards)
    elements = sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
    total = sum(found.values())
    unit, divisor = ("GiB", 2**30) if total >= 2**30 else ("MiB", 2**20)
    parts = ", ".join(f"{name} {size / divisor:.2f}" for name, size in found.items())
    log.info("%s; %.1f M parameters of a network on rank 0", run.layout_summary(world_size), elements / 1e6)
    log.info("memory of rank 0 between steps: %.2f %s (%s)", total / divisor, unit, parts)
