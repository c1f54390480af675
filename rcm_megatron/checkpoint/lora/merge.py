"""LoRA files merged into a checkpoint while it is read, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from rcm_megatron.checkpoint.lora.naming import namings_of
from rcm_megatron.checkpoint.lora.read import Change, LoraFile, sum_of
from rcm_megatron.checkpoint.sources import CheckpointSource, LazyTensor
from rcm_megatron.checkpoint.translate import entries_for
from rcm_megatron.config import ModelConfig
from rcm_megatron.families.key_map import Entry

Scaled = Sequence[tuple[float, Change]]


def merged(
    source: CheckpointSource, model: ModelConfig, loras: Sequence[tuple[LoraFile, float]], *, wide: bool = False
) -> CheckpointSource:
    """``source`` whose tensors are W + scale · B · A, summed in fp32 and rounded once to the tensor's dtype.

    ``wide``: not rounded, for a target of another dtype. Of a network whose q, k, v are one tensor each part gets its own change.
    """
    tensors = dict(source.tensors)
    by_internal: dict[str, dict[int, list[tuple[float, Change]]]] = {}
    for lora, scale in loras:
        for (internal, index), changes in lora.changes.items():
            listed = by_internal.setdefault(internal, {}).setdefault(index, [])
            listed += [(scale, change) for change in changes]
    parts = next(namings_of(model)).entries(model)
    for internal, entry in entries_for(source.format, model).items():
        if internal not in by_internal:
            continue
        if len(entry.external) == len(parts[internal].external):
            for index, scaled in by_internal[internal].items():
                tensors[entry.external[index]] = _changed(source, entry.external[index], partial(_add, scaled), wide)
        else:
            add = partial(_add_to_parts, by_internal[internal], parts[internal])
            tensors[entry.external[0]] = _changed(source, entry.external[0], add, wide)
    return replace(source, tensors=tensors)


def _changed(source: CheckpointSource, name: str, add, wide: bool) -> LazyTensor:
    held = source.tensors[name]

    def read(index: tuple[slice, ...]) -> Tensor:
        value = source.read(name)
        total = add(value)
        return (total if wide else total.to(value.dtype))[index]

    return LazyTensor(held.shape, read, torch.float32 if wide and held.dtype != torch.float64 else held.dtype)


def _add(changes: Scaled, value: Tensor) -> Tensor:
    return sum_of(((scale, _shaped(change, value)) for scale, change in changes), value)


def _shaped(change: Change, like: Tensor) -> Change:
    """A Conv3d's change, of a linear: the same numbers."""
    return replace(change, delta=lambda: change.delta().reshape(like.shape))


def _add_to_parts(changes: Mapping[int, Scaled], entry: Entry, value: Tensor) -> Tensor:
    pieces = enumerate(entry.split(value))
    wide = value.dtype if value.dtype == torch.float64 else torch.float32
    return entry.join(_add(changes[i], part) if i in changes else part.to(wide) for i, part in pieces)
