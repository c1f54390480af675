"""The ranks of one model replica must train on the same samples; with `data.on_error: skip` their disks may disagree."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from rcm_megatron.data.dali import Batch
from rcm_megatron.data.manifest import DatasetError
from rcm_megatron.parallel.groups import ParallelGroups
from rcm_megatron.platform.device import this_device


def require_same_rows(batches: Sequence[Batch], groups: ParallelGroups) -> None:
    """DatasetError, on all ranks of a replica, if they do not hold the same rows of the dataset in one step's micro-batches.

    One reduction of a few integers over tp*cp and one over pp; names are exchanged only when there is something to name."""
    rows = torch.cat([batch.dataset_rows for batch in batches])
    spread = torch.cat([rows, -rows]).to(this_device())
    for group in (groups.tp_cp, groups.pp):
        dist.all_reduce(spread, op=dist.ReduceOp.MAX, group=group)
    highest, lowest = spread[: len(rows)], -spread[len(rows) :]
    if torch.equal(highest, lowest):
        return
    of_rank = {dist.get_rank(): rows.tolist()}
    for group in (groups.tp_cp, groups.pp):
        found: list[dict[int, list[int]]] = [{} for _ in range(group.size())]
        dist.all_gather_object(found, of_rank, group=group)
        of_rank = {rank: rows for part in found for rank, rows in part.items()}
    listed = "; ".join(f"rank {rank}: {rows}" for rank, rows in sorted(of_rank.items()))
    raise DatasetError(
        f"got other dataset rows on other ranks of one model replica: {listed}; need the same on all; fix: the ranks' disks disagree "
        "about a shard that one of them had to skip: compare the copies, or set data.on_error=raise to see which member it is"
    )
