"""What a run holds on a rank from step to step, by arithmetic: known before any weight is read."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rcm_megatron.config import NetworkConfig, RunConfig
from rcm_megatron.models.dit import DiffusionTransformer
from rcm_megatron.networks.adapters import Bases
from rcm_megatron.networks.build import build_network, frozen
from rcm_megatron.parallel.groups import ParallelGroups

log = logging.getLogger(__name__)

GRADIENT = MAIN = EMA = 4
MOMENTS = 8
"""Bytes an element: all of them fp32."""


@dataclass(frozen=True)
class Held:
    """Parameters of one network on one rank."""

    elements: int = 0
    bytes: int = 0
    narrow: int = 0
    """Elements that are not fp32. An fp32 weight is its own main parameter."""

    def optimizer_bytes(self, settings: NetworkConfig) -> int:
        """Moments and main parameters, of all ranks that share them; those of sharded weights are the weights."""
        return MOMENTS * self.elements + (0 if settings.is_in_pieces else MAIN * self.narrow)

    def __add__(self, other: "Held") -> "Held":
        return Held(self.elements + other.elements, self.bytes + other.bytes, self.narrow + other.narrow)

    def times(self, count: int) -> "Held":
        """Of so many."""
        return Held(count * self.elements, count * self.bytes, count * self.narrow)


def held_by(parameters: Iterable[nn.Parameter]) -> Held:
    """Of these parameters."""
    sizes = [(p.numel(), p.element_size(), p.dtype == torch.float32) for p in parameters]
    return Held(
        sum(n for n, *_ in sizes), sum(n * width for n, width, _ in sizes), sum(n for n, _, wide in sizes if not wide)
    )


def held_on_rank(run: RunConfig, groups: ParallelGroups) -> dict[str, Held]:
    """Role -> the parameters of this rank, without memory for them; of a role that trains a LoRA the LoRA's, "ROLE base" its base's."""
    with FakeTensorMode():
        bases = Bases(run, lambda role: frozen(build_network(run, role, groups)))
        held = {}
        for role in run.roles:
            chunks, is_lora = bases.network(role), run.trains_lora(role)
            held[role] = held_by(_parameters(chunks, lora=is_lora))
            if is_lora:
                held[f"{role} base"] = held_by(_parameters(chunks, lora=False))
    return held


def _parameters(chunks: Iterable[DiffusionTransformer], *, lora: bool) -> Iterator[nn.Parameter]:
    """Of every chunk, those of its LoRA or all others. By chunk: embedders are on each."""
    return (value for chunk in chunks for name, value in chunk.named_parameters() if (".lora." in name) == lora)


def standing_bytes(run: RunConfig, held: Mapping[str, Held], *, shards: int) -> dict[str, int]:
    """Device bytes of a rank by what they are. ``held``: the rank's parameters of each role; ``shards``: dp*cp.

    Left out are what a step allocates and Megatron's padding of gradients. Parts over dp*cp are means: its ranks' differ a little.
    """
    found, largest = {}, max(run.trained_roles, key=lambda role: held[role].elements)
    for role in run.roles:
        settings, own = run.networks[role], held[role]
        frozen_part = f"{role} base" if run.trains_lora(role) else role
        if frozen_part != role or role not in run.trained_roles:
            # roles that begin alike hold their weights once
            size = held[frozen_part].bytes if run.base_of(role) == role else 0
            found[frozen_part] = {"resident": size, "sharded": size // shards, "offloaded": 0}[settings.weights]
        if role not in run.trained_roles:
            continue
        in_pieces = settings.is_in_pieces and shards > 1
        found[f"{role} weights"] = MAIN * own.elements // shards if in_pieces else own.bytes
        if role == largest or not run.memory.free_idle_gradients:  # else one network's at a time
            found[f"{role} gradients"] = GRADIENT * own.elements // (shards if in_pieces else 1)
        found[f"{role} optimizer"] = 0 if settings.offload_optimizer else own.optimizer_bytes(settings) // shards
        if settings.ema is not None:
            found[f"{role} EMA"] = EMA * own.elements // shards
    return found


def log_footprint(run: RunConfig, groups: ParallelGroups, *, world_size: int) -> None:
    """One line of the layout, one of the memory, where somebody reads them."""
    if not log.isEnabledFor(logging.INFO):
        return
    held = held_on_rank(run, groups)
    found = standing_bytes(run, held, shards=groups.dp_cp.size())
    counts = {role: own.elements / 1e6 for role, own in held.items()}
    if len(set(counts.values())) == 1:
        sizes = f"{next(iter(counts.values())):.1f} M parameters of a network"
    else:
        sizes = "M parameters of " + ", ".join(f"{role} {count:.1f}" for role, count in counts.items())
    total = sum(found.values())
    unit, divisor = ("GiB", 2**30) if total >= 2**30 else ("MiB", 2**20)
    parts = ", ".join(f"{name} {size / divisor:.2f}" for name, size in found.items())
    log.info("%s; %s on rank 0", run.layout_summary(world_size), sizes)
    log.info("memory of rank 0 between steps: %.2f %s (%s)", total / divisor, unit, parts)
