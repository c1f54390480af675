"""What may be chosen: every legal layout of a configuration on a number of GPUs, and the memory policies from cheap to dear."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from rcm_megatron.config import ParallelConfig, RunConfig
from rcm_megatron.config.validate import is_valid


@dataclass(frozen=True, kw_only=True)
class Policies:
    """What costs time and saves memory."""

    recompute: str
    free_idle_gradients: bool
    frozen_weights: str
    """Of the networks that do not train."""
    trained_weights: str
    """Of those that do; FP8 keeps them resident."""
    offload_optimizer: bool

    def applied_to(self, run: RunConfig) -> RunConfig:
        """``run`` with these policies."""
        networks = dict(run.networks)
        for role in run.roles:
            trained = role in run.trained_roles
            changes = {"weights": self.frozen_weights}
            if trained:
                weights = "resident" if networks[role].fp8 else self.trained_weights
                changes = {"offload_optimizer": self.offload_optimizer, "weights": weights}
            networks[role] = replace(networks[role], **changes)
        memory = replace(run.memory, recompute=self.recompute, free_idle_gradients=self.free_idle_gradients)
        return replace(run, networks=networks, memory=memory)


POLICIES = tuple(
    Policies(
        recompute=recompute,
        free_idle_gradients=freed,
        frozen_weights=frozen,
        trained_weights=trained,
        offload_optimizer=offloaded,
    )
    for trained, recompute, offloaded, frozen, freed in product(
        ("resident", "sharded"),
        ("none", "selective", "attention", "full"),
        (False, True),
        ("resident", "sharded", "offloaded"),
        (False, True),
    )
)
"""By what trains, whole or in pieces, and by recomputation from fast to slow; of each from cheap to dear."""


def layouts_of(run: RunConfig, world_size: int, *, gpus_per_node: int) -> Iterator[RunConfig]:
    """``run`` in every layout that is legal on ``world_size`` ranks, of degrees that are powers of two or divide what they cut.

    Tensor parallelism stays inside a node."""
    model = run.model
    tps = [n for n in _divisors(model.num_heads) if n <= gpus_per_node]
    for tp, ulysses, ring, pp in product(
        tps, _divisors(model.num_heads), _powers(world_size), _depths(model.num_layers)
    ):
        size = tp * ulysses * ring * pp
        if size > world_size or world_size % size or model.num_heads % (tp * ulysses):
            continue
        for vpp in (1, 2) if pp > 1 else (1,):
            parallel = ParallelConfig(tp=tp, ring=ring, ulysses=ulysses, pp=pp, vpp=vpp)
            laid_out = with_layout(run, parallel)
            if is_valid(laid_out, world_size):
                yield laid_out


def with_layout(run: RunConfig, parallel: ParallelConfig) -> RunConfig:
    """``run`` on other degrees, every network's blocks cut evenly."""
    networks = {role: replace(network, chunk_layers=None) for role, network in run.networks.items()}
    return replace(run, parallel=parallel, networks=networks)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _powers(most: int) -> list[int]:
    return [2**k for k in range(most.bit_length()) if 2**k <= most]


def _depths(layers: int) -> list[int]:
    """Pipeline stages that leave each two blocks or more."""
    return [n for n in range(1, layers // 2 + 1) if n == 1 or layers % n == 0 or n & (n - 1) == 0]
