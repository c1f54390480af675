"""A deep run from shallow ones: every number of a step is affine in each network's blocks, and in micro-batches.

So a rank with many blocks follows from runs of two and of three blocks a pipeline piece, and a step of many micro-batches from one with as
few as keep all stages busy and one with one more each: b + Σ over networks c (blocks − 2), each coefficient affine in the micro-batches.
Not from one block, which is first and last at once; and of a network in pieces not from fewer than four, because two blocks are whole
while others wait for their turn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from rcm_megatron.config import RunConfig
from rcm_megatron.dryrun.driver import Numbers

FEWEST, FEWEST_IN_PIECES = 2, 4
"""Blocks of a piece. Of a trained network whose weights are sharded more: in its backward one block has the next one's weights and the
last one's gradients beside its own."""
WORTH_IT = 5
"""Blocks and micro-batches from which on two shallow runs take less time than the deep one."""


@dataclass(frozen=True)
class Part:
    """A run that is executed, and with which weight its numbers enter."""

    run: RunConfig
    weight: float


def parts_of(run: RunConfig, *, rank: int, world_size: int) -> list[Part]:
    """What to execute for ``rank``: the run itself, where nothing shallower tells all."""
    depths, batches = _depths(run, rank, world_size), _micro_batches(run, world_size)
    parts = []
    for (micro_batches, share), (blocks, weight) in product(batches, depths):
        shallow = run if blocks is None else with_blocks(run, blocks)
        if micro_batches is not None:
            per_micro_batch = run.trainer.micro_batch_size * run.parallel.dp(world_size)
            batch = replace(run.trainer, global_batch_size=micro_batches * per_micro_batch)
            shallow = replace(shallow, trainer=batch)
        parts.append(Part(shallow, share * weight))
    return parts


def blocks_of(run: RunConfig, role: str, *, rank: int, world_size: int) -> tuple[int, ...]:
    """Blocks of each piece of a network that ``rank`` holds."""
    parallel = run.parallel_of(role)
    stage = rank // (world_size // parallel.pp)
    ranges = parallel.layer_ranges(run.model_of(role).num_layers)
    return tuple(len(layers) for layers in ranges[stage :: parallel.pp])


def with_blocks(run: RunConfig, blocks: Mapping[str, int]) -> RunConfig:
    """``run`` with networks of so many blocks in every piece, by role."""
    pieces = run.parallel.pp * run.parallel.vpp
    networks = {}
    for role, network in run.networks.items():
        if role in blocks:
            model = replace(run.model_of(role), num_layers=blocks[role] * pieces)
            network = replace(network, model=model, chunk_layers=None)
        networks[role] = network
    return replace(run, networks=networks, parallel=replace(run.parallel, chunk_layers=None))


def _depths(run: RunConfig, rank: int, world_size: int) -> list[tuple[dict[str, int] | None, float]]:
    """(Blocks of a piece by role, None: as they are; weight)."""
    own = {role: blocks_of(run, role, rank=rank, world_size=world_size) for role in run.roles}
    if any(len(set(pieces)) > 1 for pieces in own.values()):
        return [(None, 1.0)]
    blocks = {role: pieces[0] for role, pieces in own.items()}
    in_pieces = any(run.networks[role].is_in_pieces for role in run.trained_roles)
    depths, fewest = sorted(set(blocks.values())), FEWEST_IN_PIECES if in_pieces else FEWEST
    if depths[-1] <= max(WORTH_IT, fewest + 3) or depths[0] < fewest:
        return [(None, 1.0)]
    base = dict.fromkeys(blocks, fewest)
    found = [(base, 1.0 - sum(depth - fewest for depth in depths))]
    for depth in depths:
        deeper = {role: fewest + 1 for role, own in blocks.items() if own == depth}
        found.append((base | deeper, float(depth - fewest)))
    return found


def _micro_batches(run: RunConfig, world_size: int) -> list[tuple[int | None, float]]:
    """(Micro-batches of a rank, None: as they are; weight)."""
    parallel = run.parallel
    count = run.trainer.global_batch_size // (run.trainer.micro_batch_size * parallel.dp(world_size))
    # As many as fill the pipeline: interleaved, the first stage is ahead by up to 2 (pp - 1) + (vpp - 1) pp + 1 chunks.
    few, step = (2 * parallel.pp, parallel.pp) if parallel.vpp > 1 else (parallel.pp, 1)
    if count <= max(few + step, WORTH_IT):
        return [(None, 1.0)]
    share = (count - few) / step
    return [(few, 1.0 - share), (few + step, share)]


def combined(parts: Sequence[tuple[float, Numbers]]) -> Numbers:
    """The weighted sum of numbers at the same place; what is nowhere in one of them is 0 there."""
    keys = dict.fromkeys(key for _, numbers in parts for key in numbers)
    found: Numbers = {}
    for key in keys:
        present = [(weight, numbers[key]) for weight, numbers in parts if key in numbers]
        if isinstance(present[0][1], dict):
            found[key] = combined(present)
        else:
            found[key] = round(math.fsum(weight * value for weight, value in present))
    return found
