"""Phases of a step: they exclude each other, add up, and take Megatron's start/stop; on CUDA the stamps are events of the stream."""

from types import SimpleNamespace

import pytest
import torch

from rcm_megatron.runtime import timers as module
from rcm_megatron.runtime.timers import PHASES, Timers, attach


class Clock:
    """A clock that moves when told."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def work(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "perf_counter", clock)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return clock


def present(seconds):
    return {phase: value for phase, value in seconds.items() if value}


def one_pass(timers, work, *, forward_only):
    """The calls that Megatron's schedule makes for one micro-batch of a middle stage."""
    timers("forward-backward", log_level=1).start(barrier=True)
    timers("forward-recv", log_level=2).start()
    work(1)
    timers("forward-recv").stop()
    timers("forward-compute", log_level=2).start()
    work(10)
    timers("forward-compute").stop()
    work(2)  # waiting for an overlapped message, outside Megatron's timers
    if not forward_only:
        timers("backward-compute", log_level=2).start()
        work(20)
        timers("backward-compute").stop()
    timers("forward-backward").stop()


def test_a_phase_inside_another_takes_its_time_from_it(clock):
    timers = Timers(["teacher", "rollout", "dual"])
    clock.work(1)
    with timers.phase("teacher"):
        clock.work(2)
        with timers.phase("stages"):
            clock.work(4)
        clock.work(8)
    clock.work(16)
    seconds = timers.pop()
    assert list(seconds) == list(timers.phases) and timers.phases[:4] == ("data", "teacher", "rollout", "dual")
    assert timers.phases[4:] == tuple(PHASES)[1:]
    assert present(seconds) == {"teacher": 10, "stages": 4, "other": 17}
    assert sum(timers.pop().values()) == 0


def test_megatrons_timers_tell_forward_backward_and_messages_apart(clock):
    timers = Timers(["teacher", "rollout", "dual"])
    with timers.phase("teacher"):
        one_pass(timers, clock.work, forward_only=True)
    with timers.phase("dual"):
        one_pass(timers, clock.work, forward_only=False)
    with timers.phase("reduce"):
        timers("all-grads-sync", log_level=1).start(barrier=True)
        clock.work(3)
        timers("all-grads-sync").stop()
    with timers.phase("optimizer"):
        timers("optimizer-inner-step", log_level=1).start(barrier=True)
        clock.work(5)
        timers("optimizer-inner-step").stop()
        timers("params-all-gather", log_level=1).start(barrier=True)
        clock.work(7)
        timers("params-all-gather").stop()
    expected = {"teacher": 10, "dual": 10, "backward": 20, "stages": 6, "reduce": 3, "optimizer": 5, "gather": 7}
    assert present(timers.pop()) == expected


def test_an_exception_closes_what_megatron_left_open(clock):
    timers = Timers(["teacher", "rollout", "dual"])
    with pytest.raises(RuntimeError), timers.phase("rollout"):
        timers("forward-backward").start()
        timers("forward-compute").start()
        clock.work(1)
        raise RuntimeError
    clock.work(2)
    assert present(timers.pop()) == {"rollout": 1, "other": 2}


def test_restart_forgets_steps_that_were_not_logged(clock):
    timers = Timers(["teacher", "rollout", "dual"])
    with timers.phase("data"):
        clock.work(5)
    timers.restart()
    with timers.phase("data"):
        clock.work(1)
    assert present(timers.pop()) == {"data": 1}


def test_an_unknown_phase_is_an_error():
    with pytest.raises(KeyError, match="techer"), Timers(["teacher", "rollout", "dual"]).phase("techer"):
        pass


class Event:
    """What the timers use of torch.cuda.Event."""

    made = 0

    def __init__(self, enable_timing):
        assert enable_timing
        Event.made += 1

    def record(self):
        self.at = module.perf_counter()

    def synchronize(self):
        self.synchronized = True

    def elapsed_time(self, later):
        return 1e3 * (later.at - self.at)


def test_on_cuda_events_are_read_at_the_end_and_used_again(clock, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "made", 0)
    timers, made = Timers(["teacher", "rollout", "dual"]), []
    for _ in range(3):
        timers.restart()
        with timers.phase("teacher"):
            one_pass(timers, clock.work, forward_only=True)
        assert present(timers.pop()) == pytest.approx({"teacher": 10, "stages": 3})
        made.append(Event.made)
    assert made[0] == made[2], made


def test_attach_reaches_every_chunk_and_optimizer():
    chunks = [SimpleNamespace(config=SimpleNamespace(timers=None)) for _ in range(3)]
    part = SimpleNamespace(config=SimpleNamespace(timers=None))
    timers = Timers(["teacher", "rollout", "dual"])
    attach(timers, [chunks[:2], None, chunks[2:]], [SimpleNamespace(chained_optimizers=[part])])
    assert all(owner.config.timers is timers for owner in (*chunks, part))
