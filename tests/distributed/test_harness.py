"""The harness itself: results by rank, the failing rank named, a hang ended, autograd in the parent harmless."""

import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed.harness import RankError, run_ranks


def sum_of_ranks(scale):
    x = torch.full((3,), float(dist.get_rank() + 1), requires_grad=True)
    y = (x * scale).detach()
    dist.all_reduce(y)
    (x * x).sum().backward()
    return dist.get_rank(), y, x.grad


def one_rank_fails():
    if dist.get_rank() == 1:
        raise ValueError("only rank 1")
    dist.barrier()


def one_rank_hangs():
    if dist.get_rank() == 1:
        time.sleep(60)


def test_results_by_rank_after_autograd_in_the_parent():
    x = torch.ones(4, requires_grad=True)
    (x * x).sum().backward()
    results = run_ranks(sum_of_ranks, 3, torch.tensor(2.0))
    assert [rank for rank, _, _ in results] == [0, 1, 2]
    for rank, total, grad in results:
        assert total.tolist() == [12.0] * 3
        assert grad.tolist() == [2.0 * (rank + 1)] * 3


def test_failing_rank_is_named():
    with pytest.raises(RankError, match=r"rank 1 of 2 raised(.|\n)*ValueError: only rank 1") as error:
        run_ranks(one_rank_fails, 2)
    assert error.value.rank == 1


def test_hang_ends_with_stacks():
    with pytest.raises(RankError, match=r"ranks \[0, 1\] of 2 did not finish in 1 s(.|\n)*one_rank_hangs"):
        run_ranks(one_rank_hangs, 2, timeout=1)


def test_local_function_is_refused():
    with pytest.raises(ValueError, match="top level"):
        run_ranks(lambda: None, 2)
