"""A network with fused kernels equals one with the PyTorch rules: dual pass, plain pass, raw gradients. See test_fused.py."""

import os

import pytest
import torch
import torch.distributed as dist

from rcm_kernels.fused import OPS, select_ops
from rcm_megatron.config import LatentConfig, ParallelConfig
from rcm_megatron.dual import Dual
from rcm_megatron.platform.device import init_distributed, this_device
from rcm_megatron.platform.megatron import prepare_megatron
from tests.distributed.harness import run_ranks
from tests.helpers import assert_close
from tests.networks import wan

assert os.environ.get("TRITON_INTERPRET") == "1", "run me with TRITON_INTERPRET=1"

MODEL = wan(num_layers=1, hidden_size=36, num_heads=3, ffn_hidden_size=50, channels=2, text_dim=6, freq_dim=16)
LATENT = LatentConfig(channels=2, frames=1, height=6, width=4)  # 6 tokens
BATCH = 2


@pytest.fixture(scope="module")
def network():
    """One block on one rank, norms and biases at random too."""
    prepare_megatron()
    from megatron.core import parallel_state

    from rcm_megatron.networks.build import build_chunks
    from rcm_megatron.networks.weights import load_weights, seeded_weights
    from rcm_megatron.parallel.groups import initialize_parallel

    init_distributed()
    groups = initialize_parallel(ParallelConfig())
    chunks = build_chunks(MODEL, LATENT, ParallelConfig(), groups=groups, params_dtype=torch.float32)
    (model,) = load_weights(chunks, seeded_weights(MODEL, seed=0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)
    yield model
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    select_ops("auto")


def results(network, setting):
    """Both halves of a dual pass, a plain pass, and the gradients of a loss of the dual pass's primal."""
    select_ops(setting)
    generator = torch.Generator().manual_seed(2)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(this_device())

    shape = (network.layout.local_tokens, BATCH, network.layout.patch_features)
    x, t_x, weight = normal(*shape), normal(*shape), normal(*shape)
    time, t_time, text = 1000 * normal(1, BATCH).sigmoid(), 10 * normal(1, BATCH), normal(5, BATCH, MODEL.text_dim)
    network.zero_grad(set_to_none=True)
    v = network(Dual.pack(x, t_x), Dual.pack(time, t_time), text)
    (v.primal * weight).sum().backward()
    named = {name: parameter.grad for name, parameter in network.named_parameters()}
    with torch.no_grad():
        plain = network(x, time, text)
    return {"primal": v.primal.detach(), "tangent": v.tangent, "plain": plain} | named


@pytest.mark.parametrize("setting", ["all", *OPS])
def test_network_with_kernels_equals_network_with_rules(network, setting):
    expected, got = results(network, "none"), results(network, setting)
    assert not torch.equal(expected["tangent"], got["tangent"]), "the same bits: the kernels did not run"
    for name, value in expected.items():
        assert_close(f"{setting}: {name}", value, got[name], rel=1e-5)


def norm_on_a_rank(setting):
    """Half of the heads on each of two ranks: the dual, and a plain pass with its gradients. Runs on a forked rank."""
    from functools import partial

    from rcm_megatron.models.dual_ops import rms_norm_across_heads
    from rcm_megatron.parallel.mappings import all_reduce_sum

    prepare_megatron()
    select_ops(setting)
    generator = torch.Generator().manual_seed(4)
    x, weight = torch.randn(5, 4, 4, 6, generator=generator), torch.randn(4, 6, generator=generator)
    mine = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    stacked, weight = x[:, :, mine], weight[mine].clone().requires_grad_()
    norm = partial(
        rms_norm_across_heads, eps=1e-6, num_features=24, sum_over_tp=partial(all_reduce_sum, group=dist.group.WORLD)
    )
    with torch.no_grad():
        dual = norm(Dual(stacked), weight).stacked
    primal = stacked[:, :2].clone().requires_grad_()
    y = norm(primal, weight)
    (y * x[:, 2:, mine]).sum().backward()
    return {"dual": dual, "y": y.detach(), "dx": primal.grad, "d_weight": weight.grad}


def test_norm_over_tensor_parallel_ranks():
    """The sums of two Gloo ranks in between of the kernels, in the forward and in the backward."""
    for expected, got in zip(run_ranks(norm_on_a_rank, 2, "none"), run_ranks(norm_on_a_rank, 2, "all"), strict=True):
        for name, value in expected.items():
            assert_close(name, value, got[name], rel=5e-6)
