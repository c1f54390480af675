"""FLOPs of a dry run on the GPU target against a formula of what one rank executes: tangents, recomputation, attention's second scores."""

from math import prod

import pytest

from rcm_megatron.checkpoint.translate import internal_shapes
from rcm_megatron.training.flops import network_flops
from tests.distributed.harness import run_ranks
from tests.dryrun.worlds import BF16, Case, run_of, simulated

TOKENS = 64
FLASH, TRITON = (2, 5, 8), (2, 7, 1)
"""Products of attention's forward and backward, and of what the head dim is made a multiple: PyTorch's flash attention; Triton, whose two
kernels of the backward both make the scores and dP."""


def linears(run, rows_of):
    """FLOPs of the linears whose names begin so, of so many rows."""
    shapes = {
        key: shape for key, shape in internal_shapes(run.model).items() if key.endswith("weight") and len(shape) == 2
    }
    return sum(
        2 * rows * prod(shape)
        for start, rows in rows_of.items()
        for key, shape in shapes.items()
        if key.startswith(start + ".")
    )


def executed(run, products):
    """FLOPs of one sample's forward, dual forward, and backward with full recomputation, of the network of ``run``."""
    model = network_flops(run.model, run.latent)
    forward_products, backward_products, multiple = products
    once = model.self_attention + model.cross_attention
    attention = once * -(-run.model.head_dim // multiple) * multiple // run.model.head_dim
    forward = model.forward - once + attention
    without_gradient_of_input = {
        "patch_embedding": TOKENS,
        "time_embedding.linear_1": 1,
        "text_embedding.linear_1": run.model.text_len,
    }
    again = forward - linears(run, {"text_embedding": run.model.text_len})
    backward = again + 2 * (model.linears + model.context_linears) - linears(run, without_gradient_of_input)
    backward += attention * backward_products // forward_products
    return {"forward": forward, "dual": model.dual, "backward": backward}


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_flops_are_those_of_the_formula(dtype):
    case = Case(1, changes=BF16 if dtype == "bf16" else {}, rollout=2)
    run = run_of(case)
    found = run_ranks(simulated, 1, case, 0, "gpu", True)[0]
    one = executed(run, FLASH if dtype == "bf16" else TRITON)
    forward, samples = one["forward"], run.trainer.global_batch_size
    expected = {
        # the guided teacher for sCM and for DMD; two student steps, the last of them again with gradient; two backward passes
        "student": {"teacher": 4 * forward, "dual": one["dual"], "rollout": 2 * forward, "fake_score": forward}
        | {"student": forward, "backward": 2 * one["backward"]},
        "fake_score": {"rollout": 2 * forward, "fake_score": forward, "backward": one["backward"]},
    }
    assert len(found["updates"]) == 2
    for name, update in found["updates"].items():
        of_phase = {phase: sum(of.values()) / samples for phase, of in update["flops"].items()}
        assert "rollout of 2" in name and of_phase == pytest.approx(expected[name.split(":")[0]], rel=1e-5), name
