"""Which elements of which parameter this rank's distributed optimizer owns.

Megatron's DistributedOptimizer lays all gradients of a model chunk into buffers, cuts every bucket of a buffer into dp*cp equal pieces and
gives each rank one: a piece begins and ends anywhere inside a parameter. Gradient norms, EMA and checkpoints all walk over
these shards. Names are those of the wrapped module: no "module." prefix. A network in pieces (rcm_megatron.parallel.sharded) is cut in the
same way, so there is one description of both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core.distributed.data_parallel_base import _BaseDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Parameter

from rcm_megatron.parallel.sharded import ShardedDataParallel


@dataclass(frozen=True, eq=False, kw_only=True)
class OwnedShard:
    """Elements [start, stop) of a flattened local parameter: this rank holds their fp32 main copy and Adam state."""

    name: str
    chunk: int
    """Index of the model chunk that the parameter belongs to."""
    parameter: Parameter
    start: int
    stop: int
    main: Tensor
    """fp32 ``[stop - start]``."""
    main_is_weight: bool
    """Whether `main` is the weight itself: of an fp32 parameter, or of a network in pieces; else it is a copy of a narrower one."""
    adam: torch.optim.Optimizer
    group: ProcessGroup
    """dp*cp: the ranks over which the parameter's elements are spread."""
    bucket: tuple[int, int]
    """(buffer, bucket) of the parameter: the same on every rank of `group`."""
    offset_in_bucket: int
    piece_size: int
    """Elements of the bucket that each rank of `group` owns."""

    @property
    def whole(self) -> bool:
        """Whether this rank owns all of the parameter."""
        return self.stop - self.start == self.parameter.numel()

    @property
    def owners(self) -> range:
        """The ranks in `group` that own a part of the parameter; the first of them speaks for it in a checkpoint."""
        last_element = self.offset_in_bucket + self.parameter.numel() - 1
        return range(self.offset_in_bucket // self.piece_size, last_element // self.piece_size + 1)

    def elements_of(self, rank: int) -> slice:
        """The elements of the flattened parameter that `rank` of `group` owns."""
        start = rank * self.piece_size - self.offset_in_bucket
        return slice(max(0, start), min(self.parameter.numel(), start + self.piece_size))

    @property
    def gradient(self) -> Tensor:
        """The reduced gradient ``[stop - start]``, valid after the gradients' reduce-scatter."""
        held = self.parameter.main_grad.view(-1)
        return held if len(held) == self.stop - self.start else held[self.start : self.stop]

    def adam_state(self) -> dict[str, Tensor]:
        """Adam's moments ``[stop - start]``, zero before the first step."""
        state = self.adam.state[self.main]
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment not in state:
                state[moment] = torch.zeros_like(self.main, requires_grad=False)
        return {moment: state[moment] for moment in ("exp_avg", "exp_avg_sq")}


def owned_shards(optimizer: MegatronOptimizer) -> list[OwnedShard]:
    """This rank's shards, in an order that does not change while the optimizer lives."""
    if isinstance(optimizer.model_chunks[0], ShardedDataParallel):
        return list(_of_pieces(optimizer.model_chunks, optimizer.optimizer))
    return _of_buffers(optimizer)


def gradient_buffers(chunk: _BaseDataParallel) -> list[Tensor]:
    """What holds the gradients of a chunk from step to step."""
    if isinstance(chunk, ShardedDataParallel):
        return [flat.gradient for flat in chunk.flats]
    return [buffer.grad_data for buffer in chunk.buffers]


def _of_pieces(chunks: Sequence[ShardedDataParallel], adam: torch.optim.Optimizer) -> Iterator[OwnedShard]:
    number = 0
    for index, chunk in enumerate(chunks):
        names = {parameter: name for name, parameter in chunk.module.named_parameters()}
        for flat in chunk.flats:
            for place in flat.held:
                yield OwnedShard(
                    name=names[place.parameter],
                    chunk=index,
                    parameter=place.parameter,
                    start=place.start,
                    stop=place.stop,
                    main=place.main,
                    main_is_weight=True,
                    adam=adam,
                    group=flat.group,
                    bucket=(0, number),
                    offset_in_bucket=place.offset,
                    piece_size=flat.piece_size,
                )
            number += 1


def _of_buffers(optimizer: MegatronOptimizer) -> list[OwnedShard]:
    places = {
        parameter: (name, index)
        for index, chunk in enumerate(optimizer.model_chunks)
        for name, parameter in chunk.module.named_parameters()
    }
    shards = []
    for part in optimizer.chained_optimizers:
        for parameter, main in _parameters_and_mains(part):
            name, chunk = places[parameter]
            buffer_index, _, bucket_index = part.model_param_gbuf_map[parameter]
            buffer = part.buffers[buffer_index]
            bucket = buffer.buckets[bucket_index]
            elements = part._get_model_param_range_map(parameter)["param"]
            shards.append(
                OwnedShard(
                    name=name,
                    chunk=chunk,
                    parameter=parameter,
                    start=elements.start,
                    stop=elements.end,
                    main=main,
                    main_is_weight=parameter.dtype == main.dtype,
                    adam=part.optimizer,
                    group=part.data_parallel_group,
                    bucket=(buffer_index, bucket_index),
                    offset_in_bucket=buffer.param_index_map[parameter][0] - bucket.offset,
                    piece_size=bucket.grad_data.numel() // part.data_parallel_group.size(),
                )
            )
    return shards


def _parameters_and_mains(part) -> list[tuple[Parameter, Tensor]]:
    """(model parameter, fp32 main shard) of one DistributedOptimizer.

    Its own lookup by index pairs them wrongly where bf16 parameters come before fp32 ones; these lists are parallel."""
    pairs = []
    for parameters, mains in (
        (part.model_float16_groups, part.shard_fp32_from_float16_groups),
        (part.model_fp32_groups, part.shard_fp32_groups),
    ):
        for group, main_group in zip(parameters, mains, strict=True):
            pairs += zip(group, main_group, strict=True)
    return pairs
