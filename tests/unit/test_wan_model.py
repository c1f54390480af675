"""The network against diffusers' WanTransformer3DModel with every parameter random: velocity, tangent, and gradient of each parameter.

diffusers' class is the oracle twice: as it is, in fp32; and as a dense fp64 twin for torch.func.jvp, where `Tensor.float` (its casts
of norms, modulation and rotary tables) means fp64 and the sinusoid is computed in fp64.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel

from rcm_megatron.config import LatentConfig, ModelConfig, ParallelConfig
from rcm_megatron.dual import Dual
from rcm_megatron.platform.device import init_distributed
from rcm_megatron.platform.megatron import prepare_megatron
from tests.helpers import assert_close
from tests.networks import wan

STOCK_BOUND, WIDE_SINUSOID_BOUND, TANGENT_BOUND, GRADIENT_BOUND = 1e-5, 2e-6, 1e-5, 1e-5


@dataclass(frozen=True)
class Case:
    """A network, a latent and a text length."""

    model: ModelConfig
    frames: int
    height: int
    width: int
    batch: int
    text: int

    @property
    def latent(self):
        return LatentConfig(channels=self.model.in_channels, frames=self.frames, height=self.height, width=self.width)


def network_config(**changes):
    sizes = {"num_layers": 3, "hidden_size": 64, "ffn_hidden_size": 88, "channels": 5, "text_dim": 18, "freq_dim": 34}
    return wan(**(sizes | changes))


CASES = {
    "odd_grid": Case(network_config(), frames=3, height=10, width=14, batch=2, text=7),
    "one_frame": Case(network_config(hidden_size=60, num_heads=6), frames=1, height=6, width=2, batch=1, text=1),
    "patch_4": Case(
        network_config(patch_size=(1, 4, 4), channels=1),
        frames=5,
        height=12,
        width=20,
        batch=3,
        text=12,
    ),
    "patch_in_time": Case(
        network_config(patch_size=(2, 2, 2), num_layers=1), frames=6, height=6, width=10, batch=2, text=5
    ),
    "no_cross_attn_norm": Case(network_config(cross_attn_norm=False), frames=2, height=6, width=10, batch=3, text=9),
}


@pytest.fixture(scope="module")
def groups():
    """Process groups of one rank, in this process, until the module's last test."""
    prepare_megatron()
    from megatron.core import parallel_state

    from rcm_megatron.parallel.groups import initialize_parallel

    init_distributed()
    yield initialize_parallel(ParallelConfig())
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def diffusers_network(case):
    """WanTransformer3DModel with every parameter random, norms and modulations too."""
    from diffusers import WanTransformer3DModel

    from tests.networks import config_of

    config = {name: value for name, value in config_of("diffusers", case.model).items() if not name.startswith("_")}
    network = WanTransformer3DModel(**config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            value = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(0.3 * value + (1.0 if name.endswith("weight") else 0.0))
            elif parameter.ndim > 1 and not name.endswith(("table", "pos_embed")):
                parameter.copy_(value / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.3 * value)
    return network.eval()


class WideSinusoid(torch.nn.Module):
    """diffusers' timestep sinusoid [cos, sin] with its angles in fp64; result in fp64."""

    def __init__(self, width):
        super().__init__()
        self.half = width // 2

    def forward(self, timesteps):
        frequencies = torch.exp(
            -torch.arange(self.half, dtype=torch.float64) / self.half * torch.tensor(1e4).double().log()
        )
        angle = timesteps.double()[:, None] * frequencies
        return torch.cat([angle.cos(), angle.sin()], dim=-1)


@contextmanager
def float_means_double():
    """diffusers' own upcasts go to fp64 inside."""
    original, torch.Tensor.float = torch.Tensor.float, torch.Tensor.double
    try:
        yield
    finally:
        torch.Tensor.float = original


def wide_sinusoid(network, case):
    network.condition_embedder.timesteps_proj = WideSinusoid(case.model.freq_dim)
    return network


def wide_twin(network, case):
    """The same network in fp64 throughout."""
    with float_means_double():
        twin = diffusers_network(case)
    twin.load_state_dict(network.state_dict())
    return wide_sinusoid(twin.double(), case)


def our_network(network, case, groups, *, dtype=torch.float32):
    from rcm_megatron.networks.build import build_chunks
    from rcm_megatron.networks.weights import load_weights

    (model,) = chunks = build_chunks(case.model, case.latent, ParallelConfig(), groups=groups, params_dtype=dtype)
    load_weights(chunks, network.state_dict())
    return model


@dataclass
class Inputs:
    """x, text and their tangents; timesteps are fp32 numbers in [0, 1000]."""

    x: torch.Tensor
    text: torch.Tensor
    timestep: torch.Tensor
    t_x: torch.Tensor
    t_timestep: torch.Tensor
    loss_weight: torch.Tensor


def inputs_of(case):
    generator = torch.Generator().manual_seed(5)
    shape = (case.batch, *case.latent.shape_CTHW)
    return Inputs(
        x=torch.randn(shape, generator=generator),
        text=torch.randn(case.batch, case.text, case.model.text_dim, generator=generator),
        timestep=torch.tensor([987.654, 31.25, 0.5])[: case.batch],
        t_x=torch.randn(shape, generator=generator),
        t_timestep=10 * torch.randn(case.batch, generator=generator),
        loss_weight=torch.randn(shape, generator=generator),
    )


def ours_plain(model, inputs):
    shard, text = model.layout.shard, inputs.text.transpose(0, 1).contiguous()
    return model.layout.unpatchify(model(shard(inputs.x), inputs.timestep[None], text))


def ours_dual(model, inputs):
    shard, text = model.layout.shard, inputs.text.transpose(0, 1).contiguous()
    x = Dual.pack(shard(inputs.x), shard(inputs.t_x))
    v = model(x, Dual.pack(inputs.timestep[None], inputs.t_timestep[None]), text)
    return model.layout.unpatchify(v.primal), model.layout.unpatchify(v.tangent)


@pytest.mark.parametrize("name", CASES)
def test_velocity_equals_diffusers(name, groups):
    case = CASES[name]
    network, inputs = diffusers_network(case), inputs_of(case)
    model = our_network(network, case, groups)
    with torch.no_grad():
        v = ours_plain(model, inputs)
        stock = network(inputs.x, inputs.timestep, inputs.text).sample
        exact = wide_sinusoid(network, case)(inputs.x, inputs.timestep, inputs.text).sample
    assert_close("velocity, diffusers as it is", stock, v, rel=STOCK_BOUND)
    assert_close("velocity, sinusoid in fp64", exact, v, rel=WIDE_SINUSOID_BOUND, row=10 * WIDE_SINUSOID_BOUND)


@pytest.mark.parametrize("name", CASES)
def test_tangent_equals_jvp_of_the_fp64_twin(name, groups):
    case = CASES[name]
    network, inputs = diffusers_network(case), inputs_of(case)
    twin, model = wide_twin(network, case), our_network(network, case, groups)

    def function(x, timestep):
        return twin(x, timestep, inputs.text.double()).sample

    primals, tangents = (inputs.x, inputs.timestep), (inputs.t_x, inputs.t_timestep)
    with torch.no_grad(), float_means_double(), sdpa_kernel(SDPBackend.MATH):
        v, t_v = torch.func.jvp(function, *(tuple(x.double() for x in pair) for pair in (primals, tangents)))
        primal, tangent = ours_dual(model, inputs)
    assert_close("primal of the dual pass", v, primal, rel=WIDE_SINUSOID_BOUND)
    assert_close("tangent of the dual pass", t_v, tangent, rel=TANGENT_BOUND, row=10 * TANGENT_BOUND)


def test_fp64_network_and_tangent_equal_the_fp64_twin_exactly(groups):
    """In fp64 nothing hides behind rounding: a wrong term of any size shows."""
    case = CASES["odd_grid"]
    network, inputs = diffusers_network(case), inputs_of(case)
    twin, model = wide_twin(network, case), our_network(network, case, groups, dtype=torch.float64)
    for field in ("x", "text", "timestep", "t_x", "t_timestep"):
        setattr(inputs, field, getattr(inputs, field).double())

    def function(x, timestep):
        return twin(x, timestep, inputs.text).sample

    with torch.no_grad(), float_means_double(), sdpa_kernel(SDPBackend.MATH):
        v, t_v = torch.func.jvp(function, (inputs.x, inputs.timestep), (inputs.t_x, inputs.t_timestep))
    with torch.no_grad():
        primal, tangent = ours_dual(model, inputs)
    assert_close("primal", v, primal, rel=1e-12)
    assert_close("tangent", t_v, tangent, rel=1e-12)


def parameter_gradients(model, case, forward, inputs):
    """Our gradients of (loss_weight * v).sum() in diffusers' names."""
    from rcm_megatron.checkpoint.translate import from_internal

    model.zero_grad()
    (forward(model, inputs) * inputs.loss_weight).sum().backward()
    named = {name: parameter.grad for name, parameter in model.named_parameters()}
    missing = [name for name, gradient in named.items() if gradient is None]
    assert not missing, f"no gradient reached {missing}"
    return dict(from_internal(named, case.model, "diffusers"))


@pytest.mark.parametrize("name", ["odd_grid", "patch_4", "no_cross_attn_norm"])
def test_gradient_of_every_parameter_equals_diffusers(name, groups):
    """Through the dual pass (primal recomputed) and through the plain one, under each recompute policy."""
    case = CASES[name]
    network, inputs = diffusers_network(case), inputs_of(case)
    twin, model = wide_twin(network, case), our_network(network, case, groups)
    with float_means_double():
        (
            twin(*(x.double() for x in (inputs.x, inputs.timestep, inputs.text))).sample * inputs.loss_weight
        ).sum().backward()
    reference = {key: parameter.grad for key, parameter in twin.named_parameters()}
    passes = {
        "dual": ("full", lambda *args: ours_dual(*args)[0]),
        "dual, attention kept": ("attention", lambda *args: ours_dual(*args)[0]),
        "plain, recomputed": ("full", ours_plain),
        "plain, attention kept": ("attention", ours_plain),
        "plain, partly recomputed": ("selective", ours_plain),
        "plain, kept": ("none", ours_plain),
    }
    for label, (recompute, forward) in passes.items():
        model.recompute = recompute
        gradients = parameter_gradients(model, case, forward, inputs)
        assert gradients.keys() == reference.keys()
        for key, gradient in reference.items():
            assert_close(f"{label} pass, gradient of {key}", gradient, gradients[key], rel=GRADIENT_BOUND)


def test_text_and_timestep_act_on_their_own_sample(groups):
    """Each sample of a batch equals the sample alone."""
    case = CASES["patch_4"]
    model, inputs = our_network(diffusers_network(case), case, groups), inputs_of(case)
    with torch.no_grad():
        whole, t_whole = ours_dual(model, inputs)
        for i in range(case.batch):
            alone = Inputs(**{field: value[i : i + 1] for field, value in vars(inputs).items()})
            v, t_v = ours_dual(model, alone)
            assert_close(f"velocity of sample {i}", whole[i : i + 1], v, rel=2e-6)
            assert_close(f"tangent of sample {i}", t_whole[i : i + 1], t_v, rel=5e-6)


def test_an_unsuited_latent_is_refused(groups):
    from rcm_megatron.models.tokens import TokenLayout

    with pytest.raises(ValueError, match=r"latent\.height=9 must divide by its patch size 2"):
        TokenLayout((5, 3, 9, 8), (1, 2, 2), groups=groups)
    layout = TokenLayout((5, 3, 8, 8), (1, 2, 2), groups=groups)
    with pytest.raises(ValueError, match=r"\(5, 3, 8, 6\).*\(5, 3, 8, 8\)"):
        layout.shard(torch.zeros(2, 5, 3, 8, 6))
    x = torch.randn(2, 5, 3, 8, 8)
    assert torch.equal(layout.gather(layout.shard(x)), x)
