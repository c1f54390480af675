"""The timers of a step on a CUDA device: the device's time, without waiting for it in between."""

from time import perf_counter

import pytest
import torch

from rcm_megatron.runtime.timers import Timers

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def test_phases_have_the_devices_time_and_do_not_wait_for_it():
    timers = Timers(["teacher", "rollout", "dual"])
    timers.pop()
    start = perf_counter()
    with timers.phase("teacher"):
        torch.cuda._sleep(400_000_000)  # cycles: 0.2 s and more
    with timers.phase("optimizer"):
        torch.cuda._sleep(40_000_000)
    queued = perf_counter() - start
    seconds = timers.pop()
    assert queued < 0.5 * (seconds["teacher"] + seconds["optimizer"]), (queued, seconds)
    assert seconds["teacher"] == pytest.approx(10 * seconds["optimizer"], rel=0.3)
    assert sum(seconds.values()) == pytest.approx(perf_counter() - start, rel=0.2)
