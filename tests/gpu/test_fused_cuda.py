"""The fused kernels on a CUDA device: the interpreter's cases at real widths, offsets past 2**31, and a network with and without them."""

import argparse

import pytest
import torch

from rcm_kernels.fused import OPS, reference, rms_norm_rope, select_ops
from tests.helpers import assert_close
from tests.kernels.fused_cases import CASES, EPS, check_forward_and_gradients, check_tangent, rotation

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.timeout(900),
]
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
SHAPES = [(1, 1, 66), (77, 3, 1536), (333, 2, 5120), (2049, 1, 640)]


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("s", "b", "d"), SHAPES)
@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients(name, s, b, d, dtype):
    check_forward_and_gradients(name, s, b, d, dtype, rel=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("s", "b", "d"), SHAPES)
@pytest.mark.parametrize("name", CASES)
def test_tangent(name, s, b, d, dtype):
    check_tangent(name, s, b, d, dtype, rel=TOLERANCE[dtype])


def test_offsets_past_two_to_the_31():
    """720p of 14B: a dual view of the fused projection, 75,600 tokens x 2 x 15,360 features."""
    tokens, heads, head_dim, last = 75600, 40, 128, slice(-64, None)
    fused = torch.empty(tokens, 2, heads, 3, head_dim, dtype=torch.bfloat16, device="cuda").normal_()
    x, weight, turn = fused.select(3, 2), torch.randn(heads, head_dim, device="cuda"), rotation(tokens, head_dim)
    options = {"eps": EPS, "num_features": heads * head_dim}
    got = rms_norm_rope.dual(x, weight, turn, **options)[last]
    wide_turn = turn[last].to(torch.complex128)
    expected = reference.jvp_of(reference.rms_norm_rope, x[last].double(), weight.double(), wide_turn, **options)
    assert_close("the last tokens", expected, got, rel=4e-3)


def network_results(bench, setting):
    """Values by name of one dual step: both halves and the gradient of every parameter."""
    select_ops(setting)
    v = bench.network(*bench.inputs())
    named = {"primal": v.primal.detach().clone(), "tangent": v.tangent.clone()}
    return named | bench.gradient_of(bench.single)


@pytest.fixture(scope="module", params=[("fp32", 1e-4), ("bf16", 5e-2)], ids=lambda param: param[0])
def step(request):
    """(what tools/benchmark_scm_step.py times, its results with the rules, the bound)."""
    from megatron.core import parallel_state

    from rcm_megatron.platform.device import init_distributed
    from rcm_megatron.platform.megatron import prepare_megatron
    from tools.benchmark_scm_step import Bench

    dtype, rel = request.param
    prepare_megatron()
    init_distributed()
    bench = Bench(argparse.Namespace(hidden=512, head_dim=128, layers=2, tokens=1024, batch=2, dtype=dtype))
    yield bench, network_results(bench, "none"), rel
    select_ops("auto")
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("setting", ["all", *OPS])
def test_network_with_kernels_equals_network_with_rules(step, setting):
    """bf16: the rules round between the operations that a kernel joins, so the two differ by roundings through two blocks."""
    bench, expected, rel = step
    got = network_results(bench, setting)
    for name, value in expected.items():
        assert_close(f"{setting}: {name}", value, got[name], rel=rel)
