"""Flow maps of two times on several layouts against one rank: losses, tangents, raw gradients of every parameter, as test_parity does.

The student has a second time, teacher and fake score have one; all weights are random, those of the second time too.
"""

from dataclasses import replace

import pytest
import torch

from rcm_megatron.config import ParallelConfig
from tests.distributed import test_cosmos_parity, test_parity
from tests.distributed.harness import run_ranks
from tests.distributed.layouts import Layout

LAYERS = 5
MODELS = {"wan": test_parity.MODEL, "cosmos": test_cosmos_parity.MODEL}
OBJECTIVES = {
    "emd": ({"emd": 100.0}, "exact", 4),
    "lmd": ({"lmd": 2.0}, "exact", 4),
    "mean_flow": ({"mean_flow": 0.5}, "exact", 4),
    "emd_and_dmd": ({"emd": 100.0, "dmd": 0.3}, "exact", 2),
    "fake_score_of_a_map": ({"dmd": 1.0}, "exact", 5),
}
OF_COSMOS = ("emd", "lmd")
LAYOUTS = (Layout(tp=2, ring=2), Layout(pp=2), Layout(ulysses=2, dp=2), Layout(pp=2, vpp=2))


def two_times(family):
    """(the student's architecture, the others')."""
    model = replace(MODELS[family], num_layers=LAYERS)
    return replace(model, second_time=True), model


def weights_of(model, seed):
    """As test_parity's, and random where a second time starts at zero."""
    from rcm_megatron.checkpoint.second_time import second_time_names

    weights, generator = with_norms(model, seed), torch.Generator().manual_seed(seed)
    for name in second_time_names(model):
        weights[name] = torch.randn(weights[name].shape, generator=generator) / weights[name].shape[-1] ** 0.5
    return weights


with_norms = test_parity.weights_of


def networks_of(parallel, dtype, family):
    student, other = two_times(family)
    roles = {"student": student, "teacher": other, "fake_score": other}
    test_parity.weights_of = weights_of
    return test_parity.build_of({role: (model, parallel) for role, model in roles.items()}, dtype)


def measure(parallel, micro_batch_size, family="wan"):
    """{objective: {quantity: whole tensor}} of this rank."""
    distillation = replace(test_parity.distillation_of(), rollout="flow_map")
    test_parity.OBJECTIVES = OBJECTIVES  # in this rank's own process
    test_parity.distillation_of = lambda: distillation
    test_parity.objectives_of = lambda kind: {}
    networks = networks_of(ParallelConfig(**parallel), torch.float32, family)
    names = OBJECTIVES if family == "wan" else OF_COSMOS
    return {name: test_parity.quantities_of(networks, name, micro_batch_size) for name in names}


@pytest.fixture(scope="module")
def one_rank():
    return run_ranks(measure, 1, {}, test_parity.MICRO_BATCH)[0]


def test_the_reference_has_every_loss_tangent_and_gradient(one_rank):
    for objective, quantities in one_rank.items():
        for name, value in quantities.items():
            assert bool(torch.isfinite(value).all()) and float(value.norm()) > 0, f"{objective}: {name}"
    for name in ("emd", "lmd", "mean_flow"):
        assert {f"loss of {name}", f"dF of {name}", f"tangent_norm of {name}"} < one_rank[name].keys()
        assert any("interval_projection" in key for key in one_rank[name])


@pytest.mark.parametrize("layout", LAYOUTS, ids=[layout.name for layout in LAYOUTS])
def test_layout(one_rank, layout):
    ranks = run_ranks(measure, layout.processes, layout.parallel, layout.micro_batch_size)
    print(layout.name, test_parity.assert_equal_quantities(one_rank, ranks))


def test_cosmos():
    layout = Layout(tp=2, pp=2)
    (reference,) = run_ranks(measure, 1, {}, test_parity.MICRO_BATCH, "cosmos")
    ranks = run_ranks(measure, layout.processes, layout.parallel, layout.micro_batch_size, "cosmos")
    print(layout.name, test_parity.assert_equal_quantities(reference, ranks))
