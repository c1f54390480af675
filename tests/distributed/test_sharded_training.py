"""Networks that train in pieces (`networks.ROLE.weights: sharded`): every number of a step is one rank's, no rank holds a whole network."""

from dataclasses import replace

import pytest
import torch

from rcm_megatron.config import ParallelConfig
from tests.distributed.harness import run_ranks
from tests.distributed.test_parity import (
    MODEL,
    References,
    assert_equal_quantities,
    build,
    quantities_of,
)

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
