"""All-reduce bandwidth inside nodes, between neighbours, and over all ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from rcm_megatron.platform.device import this_device

REPEATS = 6
"""The best of them counts; the first also connects the ranks."""


def measure(nodes: Sequence[str]) -> dict[str, float]:
    """Bus bandwidths in GB/s that this rank took part in, of rings over the initialized default group: {"node": inside its node,
    "pair": the better of those with the nodes before and after it, "all": over all ranks}; what does not apply is left out.

    `nodes`: the node of each rank. Raises RuntimeError when a group does not answer in time, or sums wrongly.
    """
    members = {node: [rank for rank, name in enumerate(nodes) if name == node] for node in dict.fromkeys(nodes)}
    found: dict[str, list[float]] = {}
    rounds = [("node", [[node] for node in members if len(members[node]) > 1])]
    rounds += [("pair", list(pairs)) for pairs in neighbours(list(members))]
    for kind, groups in rounds:
        for names in groups:
            ranks = [rank for name in names for rank in members[name]]
            if dist.get_rank() in ranks:
                group = dist.new_group(ranks, use_local_synchronization=True)
                found.setdefault(kind, []).append(_bus_bandwidth(group))
        dist.barrier()
    if len(nodes) > 1:
        found["all"] = [_bus_bandwidth(dist.group.WORLD)]
    return {kind: max(values) for kind, values in found.items()}


def neighbours(nodes: Sequence[str]) -> Iterator[list[tuple[str, str]]]:
    """Rounds of disjoint pairs: in a ring of `nodes` each meets the one before and the one after, so a slow node makes all its pairs
    slow, and a good one has a good pair."""
    count = len(nodes)
    links = [(index, (index + 1) % count) for index in range(count if count > 2 else count - 1)]
    odd_one = [links.pop()] if len(links) % 2 and len(links) > 1 else []
    for chosen in (links[::2], links[1::2], odd_one):
        if chosen:
            yield [(nodes[a], nodes[b]) for a, b in chosen]


def _bus_bandwidth(group: dist.ProcessGroup) -> float:
    """GB/s on each link of a ring: 2 (n - 1) / n of the bytes pass it."""
    size = group.size()
    numbers = torch.empty(2**24 if torch.cuda.is_available() else 2**18, device=this_device())
    best = float("inf")
    for _ in range(REPEATS):
        numbers.fill_(1.0)
        dist.barrier(group=group)
        start = time.perf_counter()
        dist.all_reduce(numbers, group=group)
        torch.cuda.synchronize() if torch.cuda.is_available() else None
        best = min(best, time.perf_counter() - start)
    if not bool((numbers == size).all()):
        raise RuntimeError(f"an all-reduce of ones over {size} ranks gave {numbers.min():g} to {numbers.max():g}")
    return 2 * (size - 1) / size * numbers.nbytes / best / 1e9
