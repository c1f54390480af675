"""A network of one time as the beginning of one of two: layers that change nothing yet, beside the weights of any checkpoint."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from rcm_megatron.checkpoint.sources import CheckpointSource, LazyTensor
from rcm_megatron.checkpoint.translate import checked_entries, entries_for, read_internal
from rcm_megatron.config import ModelConfig
from rcm_megatron.families.key_map import Entry
from rcm_megatron.registries import FORMATS, family_of


def start_of(name: str, model: ModelConfig) -> str | None:
    """The parameter whose values a parameter of a second time starts with; None: zeros. Raises KeyError for any other parameter."""
    for beginning, source in family_of(model).second_time.items():
        if name.startswith(beginning):
            return None if source is None else source + name.removeprefix(beginning)
    raise KeyError(name)


def second_time_names(model: ModelConfig) -> tuple[str, ...]:
    """The parameters that a second time adds to a network, none for one of one time."""
    names = entries_for("internal", model) if model.second_time else ()
    return tuple(name for name in names if name.startswith(tuple(family_of(model).second_time)))


def holds_second_time(source: CheckpointSource, model: ModelConfig) -> bool:
    """Whether a checkpoint has a parameter of a second time."""
    return any(name in source for name in second_time_names(model))


def with_second_time(source: CheckpointSource, model: ModelConfig) -> CheckpointSource:
    """A checkpoint of a network of one time as one of ``model``, in internal names; tensors are read when they are asked for.

    Raises CheckpointError for a checkpoint that is not ``model`` but for its second time.
    """
    source, entries = checked_entries(source, replace(model, second_time=False))
    tensors = {name: _lazy(source, entry) for name, entry in entries.items()}
    for name, entry in entries_for("internal", model).items():
        if name not in tensors:
            tensors[name] = _starting(start_of(name, model), tensors, entry.internal_shape)
    config = FORMATS["internal"].naming_of(model).write_config(model)
    return replace(source, tensors=tensors, config=config, where=f"{source.where} with a second time")


def _lazy(source: CheckpointSource, entry: Entry) -> LazyTensor:
    return LazyTensor(entry.internal_shape, partial(_read, source, entry), source.tensors[entry.external[0]].dtype)


def _read(source: CheckpointSource, entry: Entry, index: tuple[slice, ...]) -> Tensor:
    """A slice of an internal parameter, reading no more than that where the file holds it so."""
    dim = next((dim for dim, part in enumerate(index) if part != slice(None)), None)
    if dim is None or not (entry.fused or entry.external_shape == entry.internal_shape):
        return read_internal(source, entry)[index]
    parts = len(entry.external) if dim == 0 else 1
    start, stop, _ = index[dim].indices(entry.internal_shape[dim])
    if entry.fused and (start % (parts * entry.head_dim) or stop % (parts * entry.head_dim)):
        return read_internal(source, entry)[index]
    rows = {"dim": dim, "start": start // parts, "stop": stop // parts}
    read = (source.read(name, **rows) for name in entry.external)
    return entry.join(read) if entry.fused else next(read)


def _starting(copied: str | None, tensors: dict[str, LazyTensor], shape: tuple[int, ...]) -> LazyTensor:
    """What `start_of` says, in the dtype of what is copied, or of any other."""
    if copied is not None:
        return tensors[copied]
    dtype = next(iter(tensors.values())).dtype
    return LazyTensor(shape, lambda index: torch.zeros((), dtype=dtype).expand(shape)[index].clone(), dtype)
