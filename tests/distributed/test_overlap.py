"""Gradients are reduced once an update, and the reduction starts while the last micro-batch's backward still runs.

Spies on Megatron's bucket groups (`start_grad_sync`) and on every parameter's gradient, in the order in which they come.
"""

import pytest
import torch

from tests.distributed.harness import run_ranks
from tests.distributed.layouts import MICRO_BATCH, SAMPLES, Layout
from tests.distributed.test_parity import assert_equal_quantities, build, measure, quantities_of

BUCKET_SIZE = 20_000
"""Elements of a bucket, of which the smallest network here then has several; Megatron's default is 40 million."""
UPDATES = 2
"""The first only counts which gradients each bucket waits for, and Megatron reduces it at the end."""
CASES = [
    ("scm_and_dmd", Layout(dp=2)),
    ("scm", Layout(dp=2)),
    ("fake_score", Layout(dp=2)),
    ("scm_and_dmd", Layout(ring=2)),
    ("scm_and_dmd", Layout(pp=2, dp=2)),
    ("scm_and_dmd", Layout(pp=2, vpp=2, dp=2)),
]


class Spy:
    """What happens in an update: (`gradient`, parameter's name) and (`reduce`, names of the bucket group's parameters)."""

    def __init__(self, chunks):
        self.events = []
        for index, chunk in enumerate(chunks):
            names = {parameter: f"{index}.{name}" for name, parameter in chunk.module.named_parameters()}
            for group in chunk.bucket_groups:
                self._watch(group, names)

    def _watch(self, group, names):
        start, ready = group.start_grad_sync, group.register_grad_ready

        def start_grad_sync(*args, **kwargs):
            if group.grad_reduce_handle is None:  # else Megatron ignores the call
                self.events.append(("reduce", tuple(sorted(names[p] for p in group.params))))
            return start(*args, **kwargs)

        def register_grad_ready(parameter, *args, **kwargs):
            self.events.append(("gradient", names[parameter]))
            return ready(parameter, *args, **kwargs)

        group.start_grad_sync, group.register_grad_ready = start_grad_sync, register_grad_ready


def small_buckets():
    """Make Megatron's DDP cut these small networks into several buckets."""
    from rcm_megatron.training import optimizer

    config_class = optimizer.DistributedDataParallelConfig
    optimizer.DistributedDataParallelConfig = lambda **options: config_class(**options, bucket_size=BUCKET_SIZE)


def events_of_updates(layout, name):
    """[events of each update], and the names of all parameters of the trained network on this rank."""
    from rcm_megatron.config import ParallelConfig

    small_buckets()
    networks = build(ParallelConfig(**layout.parallel), torch.float32, num_layers=layout.num_layers)
    chunks = networks["fake_score"] if name == "fake_score" else networks["student"]
    spy, updates = Spy(chunks), []
    for _ in range(UPDATES):
        quantities_of(networks, name, layout.micro_batch_size)
        updates.append(list(spy.events))
        spy.events.clear()
    names = {f"{i}.{name}" for i, chunk in enumerate(chunks) for name, _ in chunk.module.named_parameters()}
    return updates, names


@pytest.mark.parametrize(("name", "layout"), CASES, ids=[f"{name}-{layout.name}" for name, layout in CASES])
def test_each_bucket_is_reduced_once_and_early(name, layout):
    """Two or four micro-batches; a step of sCM and DMD has a backward pass over each of them for both."""
    passes = SAMPLES // (layout.micro_batch_size * layout.dp) * (2 if name == "scm_and_dmd" else 1)
    for rank, (updates, names) in enumerate(run_ranks(events_of_updates, layout.processes, layout, name)):
        for update, events in enumerate(updates):
            where = f"rank {rank}, update {update}"
            reduced = [parameter for kind, group in events if kind == "reduce" for parameter in group]
            assert sorted(reduced) == sorted(names), f"{where}: every bucket once"
            gradients = [parameter for kind, parameter in events if kind == "gradient"]
            assert {parameter: gradients.count(parameter) for parameter in names} == dict.fromkeys(names, passes), where
            last = {parameter: i for i, (kind, parameter) in enumerate(events) if kind == "gradient"}
            starts = {group: i for i, (kind, group) in enumerate(events) if kind == "reduce"}
            for group, start in starts.items():
                assert start > max(last[parameter] for parameter in group), f"{where}: {group} before its last gradient"
            if update > 0:
                assert min(starts.values()) < max(last.values()), (
                    f"{where}: nothing is reduced until the backward is over"
                )


def measure_with_small_buckets(*arguments):
    small_buckets()
    return measure(*arguments)


@pytest.mark.parametrize("layout", [Layout(dp=2), Layout(ring=2, dp=2)], ids=lambda layout: layout.name)
def test_gradients_do_not_depend_on_the_buckets(layout):
    """Several steps one after the other, all but the first with their reductions inside the backward."""
    arguments = (MICRO_BATCH, torch.float32, ("scm", "scm_and_dmd", "fake_score", "dcm"), layout.num_layers)
    (reference,) = run_ranks(measure, 1, {}, *arguments)
    assert_equal_quantities(
        reference, run_ranks(measure_with_small_buckets, layout.processes, layout.parallel, *arguments)
    )
