"""The Cosmos-Predict2 network against diffusers' CosmosTransformer3DModel with every parameter random: velocity, tangent, gradients.

The oracle is diffusers' class twice, as in test_wan_model: as it is, in fp32; and in fp64 with its own roundings to fp32 (rotary tables,
the sinusoid, RMSNorm's statistics) replaced by their definitions in fp64.
"""

from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel

from rcm_megatron.config import LatentConfig, ModelConfig, ParallelConfig
from rcm_megatron.diffusion import trigflow
from rcm_megatron.dual import Dual
from rcm_megatron.inputs import Condition
from rcm_megatron.platform.device import init_distributed
from rcm_megatron.platform.megatron import prepare_megatron
from tests.helpers import assert_close
from tests.networks import cosmos

STOCK_BOUND, TANGENT_BOUND, GRADIENT_BOUND = 1e-5, 1e-5, 1e-5


@dataclass(frozen=True)
class Case:
    """A network, a latent, a text length, and for Video2World how many latent frames are given of each sample."""

    model: ModelConfig
    frames: int
    height: int
    width: int
    batch: int
    text: int
    given: tuple[int, ...] = ()

    @property
    def latent(self):
        return LatentConfig(channels=self.model.in_channels, frames=self.frames, height=self.height, width=self.width)


def network_config(**changes):
    sizes = {"num_layers": 3, "hidden_size": 64, "ffn_hidden_size": 128, "channels": 5, "text_dim": 18}
    sizes |= {"rope_max_seq_len": 120, "max_size": (9, 24, 30)}
    return cosmos(**(sizes | changes))


VIDEO = {"conditional_frames": True, "rope_fps": 16.0, "rope_scale": (20 / 24, 2.0, 2.0)}
CASES = {
    "image": Case(network_config(), frames=1, height=10, width=14, batch=2, text=7),
    "one_token": Case(network_config(hidden_size=36, num_heads=3), frames=1, height=2, width=2, batch=1, text=1),
    "video_odd": Case(network_config(rope_fps=10.0), frames=3, height=6, width=10, batch=3, text=5),
    "positions": Case(network_config(learnable_positions=True), frames=3, height=6, width=10, batch=2, text=9),
    "no_mask": Case(
        network_config(padding_mask=False, patch_size=(2, 2, 2)), frames=4, height=6, width=10, batch=2, text=4
    ),
    "video2world": Case(network_config(**VIDEO), frames=5, height=6, width=10, batch=3, text=6, given=(2, 0, 1)),
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


def without_torchvision():
    """diffusers resizes the padding mask with torchvision, where that is installed; nearest neighbours are torch's as well."""
    from diffusers.models.transformers import transformer_cosmos

    def resize(mask, size, interpolation):
        return torch.nn.functional.interpolate(mask, size, mode="nearest")

    if not hasattr(transformer_cosmos, "transforms"):
        functional, mode = SimpleNamespace(resize=resize), SimpleNamespace(NEAREST="nearest")
        transformer_cosmos.transforms = SimpleNamespace(functional=functional, InterpolationMode=mode)


def diffusers_network(case):
    """CosmosTransformer3DModel with every parameter random, norms and modulations too."""
    from diffusers import CosmosTransformer3DModel

    from tests.networks import config_of

    without_torchvision()

    config = {k: v for k, v in config_of("diffusers", case.model).items() if not k.startswith("_")}
    network = CosmosTransformer3DModel(**config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            value = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(1 + 0.3 * value)
            elif "pos_emb" in name:
                parameter.copy_(value)
            else:
                parameter.copy_(value / parameter.shape[-1] ** 0.5)
    return network.eval()


@contextmanager
def float_means_double():
    """diffusers' own upcasts go to fp64 inside."""
    original, torch.Tensor.float = torch.Tensor.float, torch.Tensor.double
    try:
        yield
    finally:
        torch.Tensor.float = original


class WideSinusoid(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.half = width // 2

    def forward(self, timesteps):
        w = torch.exp(-torch.arange(self.half, dtype=torch.float64) / self.half * torch.tensor(1e4).double().log())
        angle = timesteps.double()[:, None] * w
        return torch.cat([angle.cos(), angle.sin()], dim=-1)


class WideNorm(torch.nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.eps, self.weight = norm.eps, norm.weight

    def forward(self, x):
        return x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.weight


class WideRope(torch.nn.Module):
    """The rotary table by its definition: base stretched by scale ** (d / (d - 2)), time in seconds times 24."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, hidden_states, fps=None):
        grid = [n // p for n, p in zip(hidden_states.shape[-3:], self.model.patch_size, strict=True)]
        side = self.model.head_dim // 6 * 2
        dims = (self.model.head_dim - 2 * side, side, side)
        positions = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
        angles = []
        for axis, (p, d, scale) in enumerate(zip(positions, dims, self.model.rope_scale, strict=True)):
            p = p.flatten() * (24 / fps if fps is not None and axis == 0 else 1)
            base = 10000 * scale ** (d / (d - 2))
            angles.append(p[:, None] / base ** (torch.arange(0, d, 2, dtype=torch.float64) / d))
        angle = torch.cat(angles * 2, dim=-1)
        return angle.cos(), angle.sin()


class WidePositions(torch.nn.Module):
    def __init__(self, positions):
        super().__init__()
        self.pos_emb_t, self.pos_emb_h, self.pos_emb_w = positions.pos_emb_t, positions.pos_emb_h, positions.pos_emb_w

    def forward(self, hidden_states):
        t, h, w = (n // p for n, p in zip(hidden_states.shape[-3:], (1, 2, 2), strict=True))
        total = self.pos_emb_t[:t, None, None] + self.pos_emb_h[:h, None] + self.pos_emb_w[:w]
        total = total.flatten(0, 2)[None]
        return total / (total.square().mean(-1, keepdim=True).sqrt() + 1e-6)


def wide_twin(network, case):
    """The same network in fp64 throughout."""
    twin = diffusers_network(case)
    twin.load_state_dict(network.state_dict())
    twin = twin.double()
    twin.rope, twin.time_embed.time_proj = WideRope(case.model), WideSinusoid(case.model.hidden_size)
    twin.time_embed.norm = WideNorm(twin.time_embed.norm)
    if case.model.learnable_positions:
        twin.learnable_pos_embed = WidePositions(twin.learnable_pos_embed)
    for block in twin.transformer_blocks:
        for attention in (block.attn1, block.attn2):
            attention.norm_q, attention.norm_k = WideNorm(attention.norm_q), WideNorm(attention.norm_k)
    return twin


def our_network(network, case, groups, *, dtype=torch.float32):
    from rcm_megatron.networks.build import build_chunks
    from rcm_megatron.networks.weights import load_weights

    (model,) = chunks = build_chunks(case.model, case.latent, ParallelConfig(), groups=groups, params_dtype=dtype)
    load_weights(chunks, network.state_dict())
    return model


@dataclass
class Inputs:
    """x, text and their tangents; s are rectified-flow times in [0, 1], of which ours are given 1000 s."""

    x: torch.Tensor
    text: torch.Tensor
    s: torch.Tensor
    t_x: torch.Tensor
    t_s: torch.Tensor
    loss_weight: torch.Tensor
    given_x0: torch.Tensor
    given: torch.Tensor | None = field(default=None)

    def double(self):
        return Inputs(**{k: v.double() if k != "given" and v is not None else v for k, v in vars(self).items()})


def inputs_of(case):
    generator = torch.Generator().manual_seed(5)
    shape = (case.batch, *case.latent.shape_CTHW)
    inputs = Inputs(
        x=torch.randn(shape, generator=generator),
        text=torch.randn(case.batch, case.text, case.model.text_dim, generator=generator),
        s=torch.tensor([0.987654, 0.03125, 0.5])[: case.batch],
        t_x=torch.randn(shape, generator=generator),
        t_s=torch.randn(case.batch, generator=generator),
        loss_weight=torch.randn(shape, generator=generator),
        given_x0=torch.randn(shape, generator=generator),
        given=torch.tensor(case.given) if case.given else None,
    )
    if case.given:  # the velocity of given frames is not the network's: see test_given_frames_come_out_as_they_went_in
        inputs.loss_weight = inputs.loss_weight * ~given_mask(inputs)
    return inputs


def given_mask(inputs):
    """Which latent positions are given, [B, 1, T, 1, 1]."""
    frames = torch.arange(inputs.x.shape[2])
    return (frames < inputs.given[:, None])[:, None, :, None, None]


def theirs(network, case, inputs, x, s):
    """diffusers' velocity as its pipelines call it: given frames clean, at the time of sigma = 1e-4; no padding."""
    height, width = inputs.x.shape[-2:]
    extra = {"padding_mask": torch.zeros(1, 1, height, width, dtype=x.dtype), "fps": case.model.rope_fps}
    if inputs.given is not None:
        mask = given_mask(inputs)
        sigma = case.model.condition_sigma
        x = torch.where(mask, inputs.given_x0.to(x.dtype), x)
        s = torch.where(mask, sigma / (1 + sigma), s[:, None, None, None, None])
        extra["condition_mask"] = mask.expand(-1, -1, -1, height, width).to(x.dtype)
    return network(x, s, inputs.text.to(x.dtype), return_dict=False, **extra)[0]


def condition_of(model, inputs):
    if inputs.given is None:
        return ()
    return (Condition(model.layout.shard(inputs.given_x0), inputs.given),)


def ours_plain(model, inputs):
    shard, text = model.layout.shard, inputs.text.transpose(0, 1).contiguous()
    v = model(shard(inputs.x), 1000 * inputs.s.double()[None], text, *condition_of(model, inputs))
    return model.layout.unpatchify(v)


def ours_dual(model, inputs):
    shard, text = model.layout.shard, inputs.text.transpose(0, 1).contiguous()
    x = Dual.pack(shard(inputs.x), shard(inputs.t_x))
    s = Dual.pack(1000 * inputs.s.double()[None], 1000 * inputs.t_s.double()[None])
    v = model(x, s, text, *condition_of(model, inputs))
    return model.layout.unpatchify(v.primal), model.layout.unpatchify(v.tangent)


def generated(inputs, v):
    """``v`` where nothing is given."""
    return v if inputs.given is None else v * ~given_mask(inputs)


@pytest.mark.parametrize("name", CASES)
def test_velocity_equals_diffusers(name, groups):
    case = CASES[name]
    network, inputs = diffusers_network(case), inputs_of(case)
    model = our_network(network, case, groups)
    with torch.no_grad():
        v = ours_plain(model, inputs)
        stock = theirs(network, case, inputs, inputs.x, inputs.s)
    assert_close("velocity", generated(inputs, stock), generated(inputs, v), rel=STOCK_BOUND, row=10 * STOCK_BOUND)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_tangent_equals_jvp_of_the_fp64_twin(name, dtype, groups):
    """In fp64 nothing hides behind rounding: a wrong term of any size shows."""
    case = CASES[name]
    network, inputs = diffusers_network(case), inputs_of(case)
    twin, model = wide_twin(network, case), our_network(network, case, groups, dtype=dtype)
    wide = inputs.double()
    bounds = (2e-6, TANGENT_BOUND) if dtype == torch.float32 else (1e-12, 1e-12)

    def function(x, s):
        return theirs(twin, case, wide, x, s)

    with torch.no_grad(), float_means_double(), sdpa_kernel(SDPBackend.MATH):
        v, t_v = torch.func.jvp(function, (wide.x, wide.s), (wide.t_x, wide.t_s))
    with torch.no_grad():
        primal, tangent = ours_dual(model, inputs if dtype == torch.float32 else wide)
    assert_close("primal", generated(inputs, v), generated(inputs, primal), rel=bounds[0])
    assert_close("tangent", generated(inputs, t_v), generated(inputs, tangent), rel=bounds[1], row=10 * bounds[1])


def parameter_gradients(model, case, forward, inputs):
    """Our gradients of (loss_weight * v).sum() in diffusers' names."""
    from rcm_megatron.checkpoint.translate import from_internal

    model.zero_grad()
    (forward(model, inputs) * inputs.loss_weight).sum().backward()
    named = {name: parameter.grad for name, parameter in model.named_parameters()}
    missing = [name for name, gradient in named.items() if gradient is None]
    assert not missing, f"no gradient reached {missing}"
    return dict(from_internal(named, case.model, "diffusers"))


@pytest.mark.parametrize("name", ["image", "positions", "video2world"])
def test_gradient_of_every_parameter_equals_diffusers(name, groups):
    """Through the dual pass (primal recomputed) and through the plain one, under each recompute policy."""
    case = CASES[name]
    network, inputs = diffusers_network(case), inputs_of(case)
    twin, model, wide = wide_twin(network, case), our_network(network, case, groups), inputs.double()
    with float_means_double():
        (theirs(twin, case, wide, wide.x, wide.s) * wide.loss_weight).sum().backward()
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


def test_given_frames_come_out_as_they_went_in(groups):
    """The x0 of a given frame is the frame, whatever the network, at every time; and its F has the tangent of a fixed x0."""
    case = CASES["video2world"]
    model, inputs = our_network(diffusers_network(case), case, groups), inputs_of(case)
    shard, mask = model.layout.shard, given_mask(inputs).expand_as(inputs.x)
    t = trigflow.to_trigflow(inputs.s.double())[None, :, None]
    xt, t_xt, t_t = shard(inputs.x).double(), shard(inputs.t_x).double(), t.cos() * t.sin()
    x_in, timestep, t_x_in, t_timestep = trigflow.precondition_jvp(xt, t, t_xt, t_t)
    text, condition = inputs.text.transpose(0, 1).contiguous(), condition_of(model, inputs)
    times = Dual.pack(timestep[..., 0], t_timestep[..., 0])
    with torch.no_grad():
        v = model(Dual.pack(x_in, t_x_in), times, text, *condition)
    x0 = model.layout.unpatchify(trigflow.denoised(xt, v.primal, t))
    assert_close("given frames", inputs.given_x0[mask], x0[mask], rel=1e-6)
    F, t_F = trigflow.velocity_jvp(xt, v.primal, t, t_xt, v.tangent, t_t)
    fixed = t.cos() * t_xt - t.sin() * t_t * xt - t.cos() * t_t * F - t.sin() * t_F  # d/dt of cos xt - sin F = x0
    fixed = model.layout.unpatchify(fixed)
    assert float(fixed[mask].abs().max()) < 1e-5
    assert float(fixed[~mask].abs().max()) > 0.1


def test_denoised_equals_the_edm_formula_of_diffusers_pipelines(groups):
    """Their loop: sigma, t = sigma / (sigma + 1), c_in = c_skip = 1 - t, c_out = -t on x = x0 + sigma noise; ours in TrigFlow."""
    case = CASES["image"]
    network, inputs = diffusers_network(case), inputs_of(case)
    model = our_network(network, case, groups)
    for sigma in (80.0, 3.0, 0.05):
        x = inputs.given_x0 + sigma * inputs.x
        s = torch.tensor(sigma / (sigma + 1))
        with torch.no_grad():
            v = theirs(network, case, inputs, x * (1 - s), s.expand(case.batch))
        expected = (1 - s) * x - s * v
        t = torch.full((1, case.batch, 1), sigma, dtype=torch.float64).atan()
        xt = t.cos() * model.layout.shard(x).double()
        x_in, timestep = trigflow.precondition(xt, t)
        with torch.no_grad():
            v = model(x_in, timestep[..., 0], inputs.text.transpose(0, 1).contiguous())
        x0 = model.layout.unpatchify(trigflow.denoised(xt, v, t))
        assert_close(f"x0 at sigma={sigma}", expected, x0, rel=1e-5)
