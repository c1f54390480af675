"""Parallel degrees against the network, the number of processes and the batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from rcm_megatron.config.advice import divisors, multiples_from, multiples_near
from rcm_megatron.config.declare import Change, Problem
from rcm_megatron.config.run import RunConfig


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def _heads(config: RunConfig) -> Iterator[Problem]:
    heads, parallel = config.model.num_heads, config.parallel
    if heads % parallel.tp:
        yield Problem(
            f"model.num_heads={heads} must divide by parallel.tp={parallel.tp}",
            (Change("parallel.tp", divisors(heads), most=heads),),
            f"it divides by {_listed(divisors(heads))}, each of which asks for other degrees or another batch",
        )
    elif heads % (parallel.tp * parallel.ulysses):
        yield Problem(
            f"model.num_heads={heads} must divide by parallel.ulysses*tp={parallel.ulysses * parallel.tp}",
            (Change("parallel.ulysses", divisors(heads // parallel.tp), most=heads),),
            f"take parallel.ulysses from {_listed(divisors(heads // parallel.tp))}, and the rest as parallel.ring",
        )


def _ffn(config: RunConfig) -> Iterator[Problem]:
    ffn, tp = config.model.ffn_hidden_size, config.parallel.tp
    if ffn % tp:
        yield Problem(
            f"model.ffn_hidden_size={ffn} must divide by parallel.tp={tp}",
            (Change("parallel.tp", divisors(ffn), most=8),),
            f"it divides by {_listed(divisors(ffn))}, each of which asks for other degrees or another batch",
        )


def _pipeline(config: RunConfig) -> Iterator[Problem]:
    """Blocks on stages."""
    parallel, layers = config.parallel, config.model.num_layers
    chunks = f"pp*vpp = {parallel.pp}*{parallel.vpp} = {parallel.num_chunks}"
    if parallel.num_chunks > layers:
        yield Problem(
            f"model.num_layers={layers} cannot give each of parallel.{chunks} pieces a block",
            (
                Change("parallel.vpp", range(layers // parallel.pp, 0, -1)),
                Change("parallel.pp", range(layers // parallel.vpp, 0, -1)),
            ),
            "lower parallel.pp or parallel.vpp",
        )
    elif parallel.chunk_layers is not None:
        counts = list(parallel.chunk_layers)
        if len(counts) != parallel.num_chunks or sum(counts) != layers:
            even = tuple(len(blocks) for blocks in replace(parallel, chunk_layers=None).layer_ranges(layers))
            yield Problem(
                f"parallel.chunk_layers={counts} must hold {parallel.num_chunks} counts ({chunks}) whose sum is "
                f"model.num_layers={layers}",
                (Change("parallel.chunk_layers", (even,)), Change("parallel.chunk_layers", (None,))),
            )


def _processes(config: RunConfig, world_size: int) -> Iterator[Problem]:
    parallel = config.parallel
    size = parallel.model_parallel_size
    if world_size % size:
        degrees = f"{parallel.tp}*{parallel.ring}*{parallel.ulysses}*{parallel.pp}"
        yield Problem(
            f"processes: got {world_size}, need a multiple of tp*ring*ulysses*pp = {degrees} = {size}",
            (Change("processes", multiples_near(world_size, size), most=2),),
            "start such a number, or lower a parallel degree",
        )


def _batch(config: RunConfig, world_size: int) -> Iterator[Problem]:
    """Whole micro-batches for every rank, and whole rounds of pp of them for the interleaved schedule."""
    parallel, trainer = config.parallel, config.trainer
    if world_size % parallel.model_parallel_size:
        return
    dp, batch = parallel.dp(world_size), trainer.global_batch_size
    step = trainer.micro_batch_size * dp
    interleaved = parallel.vpp > 1 and parallel.pp > 1
    larger = Change("trainer.global_batch_size", multiples_from(batch, step * (parallel.pp if interleaved else 1)))
    if batch % step:
        yield Problem(
            f"trainer.global_batch_size={batch} must divide by micro_batch_size*dp = {trainer.micro_batch_size}*{dp} = {step} "
            f"(dp = {world_size} processes / {parallel.model_parallel_size})",
            (larger, Change("trainer.micro_batch_size", range(trainer.micro_batch_size - 1, 0, -1))),
        )
    elif interleaved and (batch // step) % parallel.pp:
        yield Problem(
            f"trainer.global_batch_size={batch} makes {batch // step} micro-batches (of micro_batch_size*dp = {step}), need a number that "
            f"divides by parallel.pp={parallel.pp}, for parallel.vpp={parallel.vpp} interleaves them",
            (larger, Change("parallel.vpp", (1,))),
        )


LAYOUT_RULES = (_heads, _ffn, _pipeline)
WORLD_RULES = (_processes, _batch)
