"""Layouts that the configuration accepts, and what the parity tests run of them: all legal ones are known, the selection covers pairs."""

from dataclasses import replace
from itertools import combinations

import pytest

from rcm_megatron.config import (
    ConfigError,
    ParallelConfig,
    load_config,
    validate,
)
from tests.distributed.layouts import (
    ALL,
    MOST_CONTEXT,
    MOST_PROCESSES,
    NAMED,
    SAMPLES,
    SELECTED,
    all_combinations,
    pairs_of,
)
from tests.unit.test_config import QUICKSTART


def test_legal_layouts_are_those_that_the_configuration_accepts():
    """`validate` agrees with the rules of tests.distributed.layouts on every combination of degrees."""
    run = load_config("model_configs/quickstart.yaml", [f"trainer.global_batch_size={SAMPLES}"])
    for layout in all_combinations():
        config = replace(
            run,
            model=replace(run.model, num_layers=layout.num_layers),
            parallel=ParallelConfig(**layout.parallel),
            trainer=replace(run.trainer, micro_batch_size=layout.micro_batch_size),
        )
        fits = layout.processes <= MOST_PROCESSES and layout.ring * layout.ulysses <= MOST_CONTEXT
        try:
            validate(config, layout.processes)
        except ConfigError:
            assert not layout.is_legal, layout.name
        else:
            assert layout.is_legal or not fits, layout.name


def test_the_selection_covers_every_pair_of_values_that_a_legal_layout_has():
    """tp, pp, vpp, dp, the kind of context parallelism (ring, Ulysses, both) and its degree."""
    together = {(a, b) for layout in ALL for a, b in combinations(factors_of(layout), 2)}
    covered = {(a, b) for layout in SELECTED for a, b in combinations(factors_of(layout), 2)}
    assert covered == together and pairs_of(SELECTED) == pairs_of(ALL)
    assert set(NAMED) <= set(SELECTED) <= set(ALL) and len(SELECTED) < len(ALL) / 2
    assert len(ALL) == len({layout.name for layout in ALL}) == 61
    assert {(layout.ring, layout.ulysses) for layout in SELECTED} >= {(4, 1), (1, 4), (2, 2)}


def factors_of(layout):
    """Named apart from Layout.pairs, so that a factor cannot be forgotten there unseen."""
    kind = {(False, False): "none", (True, False): "ring", (False, True): "ulysses", (True, True): "both"}
    parallel = ParallelConfig(**layout.parallel)
    return (
        ("tp", parallel.tp),
        ("kind of cp", kind[parallel.ring > 1, parallel.ulysses > 1]),
        ("cp", parallel.cp),
        ("pp", parallel.pp),
        ("vpp", parallel.vpp),
        ("dp", parallel.dp(layout.processes)),
    )


PIPELINES = {
    "pp2": ["parallel.pp=2"],
    "pp4": ["parallel.pp=4"],
    "uneven": ["parallel.pp=2", "parallel.chunk_layers=[1, 3]"],
    "vpp": ["parallel.pp=2", "parallel.vpp=2", "trainer.micro_batch_size=8"],
    "uneven_vpp": ["parallel.pp=2", "parallel.vpp=2", "model.num_layers=5", "trainer.micro_batch_size=4"],
    "one_micro_batch": ["parallel.pp=4", "trainer.micro_batch_size=16"],
}


@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_that_can_run(name):
    config = load_config(QUICKSTART, PIPELINES[name])
    validate(config, config.parallel.model_parallel_size)


@pytest.mark.parametrize(
    ("layers", "parallel", "counts"),
    [
        (4, {}, [4]),
        (4, {"pp": 2}, [2, 2]),
        (5, {"pp": 2}, [3, 2]),
        (30, {"pp": 4}, [7, 8, 8, 7]),
        (9, {"pp": 4, "vpp": 2}, [1, 1, 1, 2, 1, 1, 1, 1]),
        (40, {"pp": 8}, [5] * 8),
        (7, {"pp": 4}, [2, 2, 2, 1]),
        (4, {"pp": 2, "chunk_layers": (1, 3)}, [1, 3]),
        (6, {"pp": 2, "vpp": 2, "chunk_layers": (1, 2, 2, 1)}, [1, 2, 2, 1]),
    ],
)
def test_blocks_are_cut_into_ranges_that_follow_each_other(layers, parallel, counts):
    """As even as possible, the larger ones in the middle, unless chunk_layers says otherwise."""
    ranges = ParallelConfig(**parallel).layer_ranges(layers)
    assert [len(blocks) for blocks in ranges] == counts
    assert [layer for blocks in ranges for layer in blocks] == list(range(layers))


@pytest.mark.parametrize("layers", range(1, 13))
def test_even_cuts_leave_no_piece_empty_and_differ_by_one_at_most(layers):
    for pieces in range(1, layers + 1):
        counts = [len(blocks) for blocks in ParallelConfig(pp=pieces).layer_ranges(layers)]
        assert sum(counts) == layers and min(counts) >= 1 and max(counts) - min(counts) <= 1
        large = [i for i, count in enumerate(counts) if count > min(counts)]
        assert large == list(range(large[0], large[0] + len(large))) if large else True


def test_sizes_that_follow_from_the_degrees():
    parallel = ParallelConfig(tp=2, ring=2, ulysses=3, pp=4, vpp=2)
    assert (parallel.cp, parallel.model_parallel_size, parallel.num_chunks, parallel.dp(96)) == (6, 48, 8, 2)
