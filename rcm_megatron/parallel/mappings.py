"""Collectives with gradients that Megatron-Core's mappings do not offer, and sums over token shards."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor
from torch.distributed import ProcessGroup


def all_reduce_sum(x: Tensor, *, group: ProcessGroup) -> Tensor:
    """Sum ``x`` over ``group``; the gradient is summed as well, because every rank goes on with its own slice of the features.

    Megatron's two one-sided mappings composed: the forward reduces in the first, the backward in the second.
    """
    if group.size() == 1:
        return x
    return copy_to_tensor_model_parallel_region(reduce_from_tensor_model_parallel_region(x, group=group), group=group)


@torch.no_grad()
def gather_tokens(x: Tensor, *, group: ProcessGroup) -> Tensor:
    """All-gather token shards ``[s, ...]`` of ``group`` into ``[s * size, ...]`` (no gradient)."""
    if group.size() == 1:
        return x
    gathered = x.new_empty((x.shape[0] * group.size(), *x.shape[1:]))
    dist.all_gather_into_tensor(gathered, x.contiguous(), group=group)
    return gathered


@torch.no_grad()
def sum_over(x: Tensor, *, groups: Sequence[ProcessGroup]) -> Tensor:
    """Sum a small statistic over every rank of ``groups`` (no gradient); returns a new tensor."""
    total = x.detach().clone()
    for group in groups:
        if group.size() > 1:
            dist.all_reduce(total, group=group)
    return total
