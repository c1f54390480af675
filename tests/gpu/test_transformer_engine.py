"""Transformer Engine's linears against Megatron-Core's own, in bf16 and FP8, on one CUDA device (FP8: Ada, Hopper or newer).

`bash tests/gpu/run.sh` runs these; elsewhere they are skipped. Not run yet on any device: the bounds are what bf16's and e4m3's
rounding lead to expect, to be tightened to what is measured.
"""

import importlib.util

import pytest
import torch

from rcm_megatron.config import LatentConfig, ParallelConfig, PrecisionConfig
from rcm_megatron.dual import Dual
from tests.helpers import assert_close, relative_error
from tests.networks import wan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or importlib.util.find_spec("transformer_engine") is None,
        reason="needs a CUDA device and Transformer Engine",
    ),
    pytest.mark.timeout(600),
]

MODEL = wan(hidden_size=512, ffn_hidden_size=1408, channels=16, text_dim=64, text_len=48, freq_dim=256)
LATENT = LatentConfig(channels=16, frames=3, height=14, width=26)
"""273 tokens, padded to 288 for FP8."""
BATCH = 2
BF16 = PrecisionConfig(params_dtype="bf16")
# relative Frobenius error against the local linears in bf16; two bf16 networks differ by their order of summation alone
SAME_BF16, SAME_BF16_GRADIENT = 1e-2, 2e-2
# e4m3 rounds to 2^-4 relative at worst, 2.6e-2 in the mean square, in both factors of each product
FP8_OUTPUT, FP8_GRADIENT = 1e-1, 2.5e-1


@pytest.fixture(scope="module")
def groups():
    import torch.distributed as dist
    from megatron.core import parallel_state

    from rcm_megatron.parallel.groups import initialize_parallel
    from rcm_megatron.platform.device import init_distributed
    from rcm_megatron.platform.megatron import prepare_megatron

    prepare_megatron()
    started = not dist.is_initialized()
    init_distributed()
    parallel_state.destroy_model_parallel()
    yield initialize_parallel(ParallelConfig())
    parallel_state.destroy_model_parallel()
    if started:
        dist.destroy_process_group()


def build(spec, groups, *, seed=1):
    """One network under Megatron's DDP."""
    from rcm_megatron.networks.build import build_chunks
    from rcm_megatron.networks.weights import load_weights, seeded_weights
    from rcm_megatron.training.optimizer import wrap_ddp

    chunks = build_chunks(
        MODEL, LATENT, ParallelConfig(), groups=groups, params_dtype=torch.bfloat16, spec=spec, token_multiple=16
    )
    load_weights(chunks, dict(seeded_weights(MODEL, seed=seed)))
    return wrap_ddp(chunks, chunks[0].config)


def inputs(layout):
    generator = torch.Generator().manual_seed(0)
    x, t_x = (layout.shard(torch.randn(BATCH, *LATENT.shape_CTHW, generator=generator)).cuda() for _ in range(2))
    timestep, t_timestep = torch.tensor([[987.6, 31.2]]).cuda(), torch.tensor([[3.0, -20.0]]).cuda()
    text = torch.randn(MODEL.text_len, BATCH, MODEL.text_dim, generator=generator).cuda()
    weight = torch.randn(x.shape, generator=generator).cuda()
    return Dual.pack(x, t_x), Dual.pack(timestep, t_timestep), text, weight


def plain_pass(ddp):
    """Output of a plain pass and the raw fp32 gradient of each parameter."""
    from rcm_megatron.training.optimizer import gather_main_grads

    network = ddp[0].module
    x, timestep, text, weight = inputs(network.layout)
    ddp[0].zero_grad_buffer()
    with ddp[0].no_sync():
        v = ddp[0](x.primal, timestep.primal, text)
        (v.float() * weight).sum().backward()
    by_parameter = gather_main_grads(ddp)
    return v.detach(), {name: by_parameter[p].clone() for name, p in network.named_parameters()}


def specs():
    from rcm_megatron.models.layer_specs import choose_layer_spec, local_layer_spec

    return local_layer_spec(), choose_layer_spec(BF16), choose_layer_spec(BF16, fp8_role="fake_score")


def test_auto_chooses_transformer_engine(groups):
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

    _, engine, fp8 = specs()
    assert (engine.column_linear, engine.row_linear, engine.fp8) == (TEColumnParallelLinear, TERowParallelLinear, False)
    assert fp8.fp8 and isinstance(build(fp8, groups)[0].module.blocks["0"].mlp.linear_fc1, TEColumnParallelLinear)


def test_outputs_tangents_and_gradients_of_both_libraries(groups):
    local, engine, _ = specs()
    networks = [build(spec, groups) for spec in (local, engine)]
    outputs, gradients = zip(*(plain_pass(network) for network in networks), strict=True)
    assert_close("output", *outputs, rel=SAME_BF16)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradients[1][name].dtype == torch.float32
        assert_close(f"gradient of {name}", gradient, gradients[1][name], rel=SAME_BF16_GRADIENT)
    x, timestep, text, _ = inputs(networks[0][0].module.layout)
    with torch.no_grad():
        duals = [network[0](x, timestep, text) for network in networks]
    assert_close("primal", duals[0].primal, duals[1].primal, rel=SAME_BF16)
    assert_close("tangent", duals[0].tangent, duals[1].tangent, rel=SAME_BF16)


def test_gradients_through_a_dual_are_those_of_the_plain_pass(groups):
    """The dual pass recomputes its primal: with fused weight gradients the recomputation writes them, once."""
    from rcm_megatron.training.optimizer import gather_main_grads

    ddp = build(specs()[1], groups)
    network, (_, expected) = ddp[0].module, plain_pass(ddp)
    x, timestep, text, weight = inputs(network.layout)
    ddp[0].zero_grad_buffer()
    with ddp[0].no_sync():
        (ddp[0](x, timestep, text).primal.float() * weight).sum().backward()
    by_parameter = gather_main_grads(ddp)
    for name, parameter in network.named_parameters():
        assert_close(f"gradient of {name}", expected[name], by_parameter[parameter], rel=SAME_BF16_GRADIENT)


def test_fp8_outputs_and_gradients_are_near_bf16(groups):
    _, engine, fp8 = specs()
    (v, gradients), (v_fp8, gradients_fp8) = plain_pass(build(engine, groups)), plain_pass(build(fp8, groups))
    assert relative_error(v, v_fp8) > 1e-4, "FP8 was not on"
    assert_close("output", v, v_fp8, rel=FP8_OUTPUT)
    whole, whole_fp8 = (torch.cat([g[name].flatten() for name in gradients]) for g in (gradients, gradients_fp8))
    assert_close("gradient of all parameters", whole, whole_fp8, rel=FP8_GRADIENT)


def test_fp8_weights_are_requantised_after_an_update(groups):
    """A cached FP8 copy would keep the old weights."""
    ddp = build(specs()[2], groups)
    network = ddp[0].module.requires_grad_(False)
    x, timestep, text, _ = inputs(network.layout)
    before = network(x.primal, timestep.primal, text)
    with torch.no_grad():
        for parameter in network.blocks.parameters():
            parameter.mul_(1.5)
    after = network(x.primal, timestep.primal, text)
    fresh = build(specs()[2], groups)[0].module.requires_grad_(False)
    fresh.load_state_dict({k: v for k, v in network.state_dict().items() if "_extra_state" not in k}, strict=False)
    assert torch.equal(after, fresh(x.primal, timestep.primal, text))
    assert relative_error(before, after) > 1e-2


def test_a_dual_in_fp8_raises(groups):
    ddp = build(specs()[2], groups)
    x, timestep, text, _ = inputs(ddp[0].module.layout)
    with pytest.raises(TypeError, match="got a Dual in a network that runs in FP8"):
        ddp[0](x, timestep, text)


def test_checkpoints_hold_parameters_alone(groups):
    local, engine, _ = specs()
    keys = [sorted(build(spec, groups)[0].module.sharded_state_dict()) for spec in (local, engine)]
    assert keys[0] == keys[1]
