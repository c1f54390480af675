"""Networks that train in pieces (`networks.ROLE.weights: sharded`): every number of a step is one rank's, no rank holds a whole network."""

import shutil

import pytest
import torch

from rcm_megatron.config import ParallelConfig, load_config
from tests.distributed import tiny_run
from tests.distributed.harness import run_ranks
from tests.distributed.test_parity import (
    References,
    assert_equal_quantities,
    build,
    quantities_of,
)
from tests.helpers import assert_close

OBJECTIVES = ("scm", "dmd", "fake_score", "scm_and_dmd")
LAYOUTS = {
    "dp2": (2, {}, 2),
    "ring2": (2, {"ring": 2}, 2),
    "ulysses2_dp2": (4, {"ulysses": 2}, 2),
    "tp2_dp2": (4, {"tp": 2}, 2),
    "pp2_dp2": (4, {"pp": 2}, 3),
    "pp2_vpp2_ring2": (4, {"pp": 2, "vpp": 2, "ring": 2}, 5),
}
"""Name -> (processes, parallel degrees, blocks)."""


def in_pieces(parallel, num_layers, objectives=OBJECTIVES, policies=("none", "selective")):
    """Quantities of objectives of this rank, and under each recompute policy those of plain passes; what it held when."""
    networks = build(ParallelConfig(**parallel), torch.float32, num_layers=num_layers, in_pieces=True)
    measured = {name: quantities_of(networks, name, 2) for name in objectives}
    by_policy = {}
    for policy in policies:
        for chunk in networks["fake_score"]:
            chunk.module.recompute = policy
        by_policy[policy] = {"fake_score": quantities_of(networks, "fake_score", 2)}
    return measured, by_policy


@pytest.fixture(scope="module")
def references():
    return References()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_those_of_one_rank(references, layout):
    processes, parallel, num_layers = LAYOUTS[layout]
    reference = references.of(num_layers, OBJECTIVES)
    ranks = run_ranks(in_pieces, processes, parallel, num_layers)
    assert_equal_quantities(reference, [measured for measured, _ in ranks])
    for policy in ("none", "selective"):
        assert_equal_quantities(reference, [by_policy[policy] for _, by_policy in ranks])


# ---- runs

IN_PIECES = ["networks.student.weights=sharded", "networks.fake_score.weights=sharded"]


def train(config_path, overrides):
    """A tiny run of this rank: (its networks' whole weights, how its student is held)."""
    from rcm_megatron.platform.megatron import prepare_megatron

    prepare_megatron()
    from rcm_megatron.parallel.groups import initialize_parallel
    from rcm_megatron.training.trainer import Trainer

    run = load_config(config_path, overrides)
    trainer = Trainer(run, initialize_parallel(run.parallel))
    trainer.train()
    trainer.close()
    return tiny_run.whole_weights(trainer), type(trainer.state.trained["student"].chunks[0]).__name__


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_run.write_tiny_run(tmp_path_factory.mktemp("tiny"))


def changes_of(runs):
    """Of each run: all parameters' change since the start, of each network."""
    start = tiny_run.initial_weights()
    return {role: tiny_run.flat_change(weights, start) for role, weights in runs.items()}


def test_a_run_in_pieces_is_the_same_and_goes_on_elsewhere(tiny, tmp_path):
    """20 steps, resident and in pieces; 10 in pieces, and from there in pieces on another layout, on one rank, and resident."""
    found = {}

    def run(name, folder, ranks, overrides):
        weights, kind = run_ranks(train, ranks, str(tiny), [*overrides, f"output_dir={tmp_path / folder}"])[0]
        assert kind == ("ShardedDataParallel" if IN_PIECES[0] in overrides else "DistributedDataParallel")
        found[name] = changes_of(weights)

    run("resident", "resident", 2, [])
    run("pieces", "pieces", 2, IN_PIECES)
    run("half", "half", 2, [*IN_PIECES, "trainer.stop_after=10"])
    for name in ("tp", "one", "back"):
        shutil.copytree(tmp_path / "half", tmp_path / name)
    run("the same layout", "half", 2, IN_PIECES)
    run("tp 2, dp 2", "tp", 4, [*IN_PIECES, "parallel.tp=2", "memory.recompute=selective"])
    run("one rank", "one", 1, [])
    run("from resident", "back", 2, [])
    for name in found.keys() - {"resident", "half"}:
        for role, change in found["resident"].items():
            assert_close(f"{name}: {role}", change, found[name][role], rel=1e-3)
    assert all(torch.equal(found["pieces"][role], found["the same layout"][role]) for role in found["pieces"])
