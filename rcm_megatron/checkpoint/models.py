"""Weights between files and built models: load a (tensor-parallel) model, gather it back, write it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from rcm_megatron.checkpoint.formats.base import WriteOptions
from rcm_megatron.checkpoint.translate import (
    Source,
    check_divides,
    checked_entries,
    from_internal,
    naming_of,
    read_internal,
)
from rcm_megatron.checkpoint.writers import check_target
from rcm_megatron.config import ModelConfig
from rcm_megatron.errors import CheckpointError, name_keys
from rcm_megatron.families.key_map import Entry
from rcm_megatron.registries import FORMATS


def load_into(
    model: nn.Module | Sequence[nn.Module],
    source: Source,
    *,
    model_config: ModelConfig,
    tp_rank: int = 0,
    tp_size: int = 1,
    partial: bool = False,
) -> None:
    """Fill every parameter of a built model, each rank reading its own slice, cast to the parameter's dtype.

    The model is untouched unless everything fits, else CheckpointError. An optimizer with fp32 copies must then `reload_model_params`.

    Args:
        model: one module or this rank's pipeline chunks, with internal parameter names (wrappers' `module.` is removed); split
            parameters carry `partition_dim`.
        source: an open checkpoint of any format, or a mapping in its naming.
        partial: the model is a pipeline stage; parameters of the others are left out.
    """
    source, entries = checked_entries(source, model_config)
    parameters = local_parameters(model)
    faults = name_keys("in the model, unknown to the key map", set(parameters) - set(entries), entries)
    if not partial:
        faults += name_keys("in the file, absent from the model", set(entries) - set(parameters), parameters)
    for name in parameters.keys() & entries.keys():
        need = _local_shape(entries[name], partition_dim(parameters[name]), tp_size)
        if tuple(parameters[name].shape) != need:
            got = list(parameters[name].shape)
            faults += f"\n  {name!r}: the model has shape {got}, the file gives {list(need)} on each of {tp_size} ranks"
    if faults:
        raise CheckpointError(f"{source.where} does not fit the built model:{faults}")
    by_chunk = [local_parameters(chunk) for chunk in ([model] if isinstance(model, nn.Module) else model)]
    with torch.no_grad():
        for name, first in parameters.items():
            value = read_internal(source, entries[name], partition_dim=partition_dim(first), rank=tp_rank, size=tp_size)
            for held in by_chunk:  # several hold the embedders
                if name in held:
                    _set_weight(held[name], value)


def _set_weight(parameter: nn.Parameter, value: Tensor) -> None:
    """One that rests in pieces (rcm_megatron.parallel.sharded) knows its place in them."""
    if hasattr(parameter, "place"):
        parameter.place.set_weight(value)
    else:
        parameter.copy_(value)


def gather_full(
    chunks: nn.Module | Sequence[nn.Module],
    *,
    tp_group: ProcessGroup | None = None,
    pp_group: ProcessGroup | None = None,
    getter: Callable[[nn.Parameter], Tensor] = lambda parameter: parameter,
) -> Iterator[tuple[str, Tensor | None]]:
    """Stream (internal name, full tensor) on the rank that is first in both groups, (name, None) on the others, stage by stage.

    A collective: all ranks of the groups must exhaust it. `getter` picks what is gathered: the parameter, or its gradient
    (`training.optimizer.gather_main_grads`). What several pieces hold is taken from the first of them.
    """
    parameters, seen = local_parameters(chunks), set()
    for owner, catalogue in enumerate(_catalogues(parameters, pp_group, getter)):
        for name, (shape, dim, dtype) in catalogue.items():
            if name in seen:
                continue
            seen.add(name)
            value = None
            if pp_group is None or pp_group.rank() == owner:
                value = _over_tensor_ranks(getter(parameters[name]).detach(), dim, tp_group)
            if owner > 0 and (tp_group is None or tp_group.rank() == 0):
                size = tp_group.size() if tp_group is not None else 1
                whole = shape if dim is None else (*shape[:dim], shape[dim] * size, *shape[dim + 1 :])
                value = _to_first_stage(value, whole, dtype, owner=owner, group=pp_group)
            yield name, value


def _catalogues(parameters: Mapping[str, nn.Parameter], pp_group: ProcessGroup | None, getter) -> list[dict]:
    """Of each stage: {name: (local shape, split dimension, dtype)} of what `getter` gives."""
    mine = {}
    for name, parameter in parameters.items():
        value = getter(parameter)
        if value is None:
            raise CheckpointError(f"{name!r}: the getter returned None; has a backward pass run?")
        mine[name] = (tuple(value.shape), partition_dim(parameter), value.dtype)
    if pp_group is None or pp_group.size() == 1:
        return [mine]
    catalogues: list = [None] * pp_group.size()
    dist.all_gather_object(catalogues, mine, group=pp_group)
    return catalogues


def write_checkpoint(
    named_tensors: Iterable[tuple[str, Tensor | None]],
    model_config: ModelConfig,
    path: str | Path,
    options: WriteOptions | None = None,
    *,
    format: str = "diffusers",
    is_writer: bool = True,
) -> None:
    """Write internal full tensors in a format. The checkpoint appears complete or not at all.

    With `gather_full`, call it on all ranks of its groups, `is_writer` on the first.
    """
    path, options = Path(path), options or WriteOptions()
    check_target(path, force=options.force)
    if not is_writer:
        for _ in named_tensors:
            pass
        return
    write_named(from_internal(named_tensors, model_config, format), model_config, path, options, format=format)


def write_named(
    tensors: Iterable[tuple[str, Tensor]], model_config: ModelConfig, path: Path, options: WriteOptions, *, format: str
) -> None:
    """Write tensors that have the names of the format already."""
    naming = naming_of(format, model_config)
    config = None if naming.write_config is None else naming.write_config(model_config)
    FORMATS[format].container.write(path, tensors, config, options)


def local_parameters(chunks: nn.Module | Sequence[nn.Module]) -> dict[str, nn.Parameter]:
    """Internal name -> parameter of this rank; the `module.` of Megatron's wrappers is removed. Of a network with a LoRA the LoRA's alone.

    Of a parameter that several chunks hold, the first chunk's.
    """
    parameters: dict[str, nn.Parameter] = {}
    for chunk in [chunks] if isinstance(chunks, nn.Module) else chunks:
        while isinstance(inner := getattr(chunk, "module", None), nn.Module):
            chunk = inner
        stored = getattr(chunk, "stored_parameters", chunk.named_parameters)
        for name, parameter in stored():
            parameters.setdefault(name, parameter)
    return parameters


def partition_dim(parameter: nn.Parameter) -> int | None:
    """The dimension that tensor parallelism splits, or None for a replicated parameter."""
    return parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None


def _local_shape(entry: Entry, dim: int | None, size: int) -> tuple[int, ...]:
    shape = entry.internal_shape
    if dim is None:
        return shape
    check_divides(entry, dim, size)
    return (*shape[:dim], shape[dim] // size, *shape[dim + 1 :])


def _over_tensor_ranks(shard: Tensor, dim: int | None, group: ProcessGroup | None) -> Tensor | None:
    """The whole tensor on the group's first rank, None on the others."""
    if group is None or group.size() == 1:
        return shard
    if dim is None:
        return shard if group.rank() == 0 else None
    shard = shard.contiguous()
    shards = [torch.empty_like(shard) for _ in range(group.size())] if group.rank() == 0 else None
    dist.gather(shard, shards, group=group, group_dst=0)
    return torch.cat(shards, dim=dim) if shards is not None else None


def _to_first_stage(
    value: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, *, owner: int, group: ProcessGroup
) -> Tensor | None:
    """`value` of the stage `owner` on the first stage, None on the others."""
    if group.rank() == owner:
        dist.send(value.contiguous(), group=group, group_dst=0)
    if group.rank() != 0:
        return None
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else "cpu"
    received = torch.empty(shape, dtype=dtype, device=device)
    dist.recv(received, group=group, group_src=owner)
    return received
