"""Parallel degrees against the network, the number of processes and the batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from rcm_megatron.config.advice import divisors, multiples_from, multiples_near
from rcm_megatron.config.declare import Change, Problem
from rcm_megatron.config.run import RunConfig
from rcm_megatron.config.validate.networks import models_of, present_roles


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def _heads(config: RunConfig) -> Iterator[Problem]:
    parallel = config.parallel
    for path, model in models_of(config):
        heads = model.num_heads
        if heads % parallel.tp:
            yield Problem(
                f"{path}.num_heads={heads} must divide by parallel.tp={parallel.tp}",
                (Change("parallel.tp", divisors(heads), most=heads),),
                f"it divides by {_listed(divisors(heads))}, each of which asks for other degrees or another batch",
            )
        elif heads % (parallel.tp * parallel.ulysses):
            yield Problem(
                f"{path}.num_heads={heads} must divide by parallel.ulysses*tp={parallel.ulysses * parallel.tp}",
                (Change("parallel.ulysses", divisors(heads // parallel.tp), most=heads),),
                f"take parallel.ulysses from {_listed(divisors(heads // parallel.tp))}, and the rest as parallel.ring",
            )


def _ffn(config: RunConfig) -> Iterator[Problem]:
    tp = config.parallel.tp
    for path, model in models_of(config):
        ffn = model.ffn_hidden_size
        if ffn % tp:
            yield Problem(
                f"{path}.ffn_hidden_size={ffn} must divide by parallel.tp={tp}",
                (Change("parallel.tp", divisors(ffn), most=8),),
                f"it divides by {_listed(divisors(ffn))}, each of which asks for other degrees or another batch",
            )


def _pipeline(config: RunConfig) -> Iterator[Problem]:
    """Blocks on stages."""
    parallel = config.parallel
    chunks = f"pp*vpp = {parallel.pp}*{parallel.vpp} = {parallel.num_chunks}"
    for path, model in models_of(config):
        layers = model.num_layers
        if parallel.num_chunks > layers:
            yield Problem(
                f"{path}.num_layers={layers} cannot give each of parallel.{chunks} pieces a block",
                (
                    Change("parallel.vpp", range(layers // parallel.pp, 0, -1)),
                    Change("parallel.pp", range(layers // parallel.vpp, 0, -1)),
                ),
                "lower parallel.pp or parallel.vpp",
            )
    cuts = {"parallel.chunk_layers": (parallel.chunk_layers, "model", config.model)}
    for role in present_roles(config):
        own = config.networks[role].chunk_layers
        cuts[f"networks.{role}.chunk_layers"] = (own, config.model_path(role), config.model_of(role))
    for path, (given, model_path, model) in cuts.items():
        layers = model.num_layers
        if given is None or parallel.num_chunks > layers:
            continue
        if len(given) != parallel.num_chunks or sum(given) != layers:
            even = tuple(len(blocks) for blocks in replace(parallel, chunk_layers=None).layer_ranges(layers))
            yield Problem(
                f"{path}={list(given)} must hold {parallel.num_chunks} counts ({chunks}) whose sum is {model_path}.num_layers={layers}",
                (Change(path, (even,)), Change(path, (None,))),
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
