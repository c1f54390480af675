"""Wan networks with image conditions against diffusers' WanTransformer3DModel: velocity, tangent, and gradient of each parameter.

Oracles as in test_wan_model, called as diffusers' pipelines call them: channels beside the latent's; CLIP tokens before the text, of which
diffusers' class wants 512 tokens then; given frames clean in their place, with a timestep of zero for each of their tokens.
"""

from dataclasses import dataclass, fields, replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from rcm_megatron.diffusion import trigflow
from rcm_megatron.dual import Dual
from rcm_megatron.inputs import Condition
from rcm_megatron.models import dual_ops
from rcm_megatron.models.tokens import TokenLayout
from tests.helpers import assert_close
from tests.unit import test_wan_model as plain
from tests.unit.test_wan_model import GRADIENT_BOUND, STOCK_BOUND, TANGENT_BOUND, WIDE_SINUSOID_BOUND, groups

__all__ = ["groups"]  # a fixture


@dataclass(frozen=True)
class Case(plain.Case):
    """... how many CLIP tokens, and how many latent frames are given of each sample."""

    image: int = 0
    given: tuple[int, ...] = ()


def network_config(wan, **changes):
    return plain.network_config(num_layers=2, **wan, **changes)


CASES = {
    "wan2.1_i2v": Case(
        network_config({"condition_channels": 7, "image_dim": 14}),
        frames=3,
        height=6,
        width=10,
        batch=2,
        text=512,
        image=9,
    ),
    "flf2v": Case(
        network_config({"condition_channels": 3, "image_dim": 10, "image_positions": 10}, hidden_size=60, num_heads=6),
        frames=2,
        height=6,
        width=2,
        batch=3,
        text=512,
        image=10,
    ),
    "wan2.2_i2v": Case(
        network_config({"condition_channels": 9}, patch_size=(2, 2, 2)), frames=4, height=6, width=10, batch=3, text=7
    ),
    "ti2v": Case(
        network_config({"conditional_frames": True}), frames=5, height=6, width=10, batch=3, text=5, given=(2, 0, 1)
    ),
}


@dataclass
class Inputs(plain.Inputs):
    """... and what is given of the video: latents, the channels of an image condition, CLIP features [B, L, g]."""

    x0: torch.Tensor
    channels: torch.Tensor
    image: torch.Tensor

    def double(self):
        return Inputs(**{field.name: getattr(self, field.name).double() for field in fields(self)})


def inputs_of(case):
    generator = torch.Generator().manual_seed(8)
    inputs, (_, *extent) = plain.inputs_of(case), case.latent.shape_CTHW
    inputs.loss_weight *= ~known_of(case)  # the velocity of given frames is not the network's: see test_given_frames
    return Inputs(
        **vars(inputs),
        x0=torch.randn(inputs.x.shape, generator=generator),
        channels=torch.randn(case.batch, case.model.condition_channels, *extent, generator=generator),
        image=2 * torch.randn(case.batch, case.image, case.model.image_dim or 0, generator=generator),
    )


def known_of(case):
    """Which latent positions are given, [B, 1, T, 1, 1]."""
    given = torch.tensor(case.given or [0] * case.batch)
    return (torch.arange(case.frames) < given[:, None])[:, None, :, None, None]


def theirs(network, case, inputs, x, timestep):
    """diffusers' velocity."""
    extra = {}
    if case.model.conditional_frames:
        known, tokens = known_of(case), case.latent.num_tokens(case.model.patch_size) // case.frames
        x = torch.where(known, inputs.x0, x)
        timestep = torch.where(known.flatten(1), 0.0, timestep[:, None]).repeat_interleave(tokens, dim=1)
    if case.model.image_dim:
        pairs = case.model.image_positions is not None  # of images, one after the other in the batch
        extra["encoder_hidden_states_image"] = (
            inputs.image.unflatten(1, (2, -1)).flatten(0, 1) if pairs else inputs.image
        )
    return network(torch.cat([x, inputs.channels], dim=1), timestep, inputs.text, return_dict=False, **extra)[0]


def condition_of(model, case, inputs):
    layout, wan = model.layout, case.model
    channels = TokenLayout((wan.condition_channels, *layout.latent_shape[1:]), layout.patch, groups=layout.groups)
    return Condition(
        x0_SBP=layout.shard(inputs.x0) if case.given else None,
        frames_B=torch.tensor(case.given) if case.given else None,
        channels_SBE=channels.shard(inputs.channels) if wan.condition_channels else None,
        image_LBD=inputs.image.transpose(0, 1).contiguous() if wan.image_dim else None,
    )


def ours_plain(model, case, inputs):
    shard, text = model.layout.shard, inputs.text.transpose(0, 1).contiguous()
    v = model(shard(inputs.x), inputs.timestep[None], text, condition_of(model, case, inputs))
    return model.layout.unpatchify(v)


def ours_dual(model, case, inputs):
    shard, text = model.layout.shard, inputs.text.transpose(0, 1).contiguous()
    x, time = Dual.pack(shard(inputs.x), shard(inputs.t_x)), Dual.pack(inputs.timestep[None], inputs.t_timestep[None])
    v = model(x, time, text, condition_of(model, case, inputs))
    return model.layout.unpatchify(v.primal), model.layout.unpatchify(v.tangent)


@pytest.mark.parametrize("name", CASES)
def test_velocity_equals_diffusers(name, groups):
    case = CASES[name]
    network, inputs = plain.diffusers_network(case), inputs_of(case)
    model, generated = plain.our_network(network, case, groups), ~known_of(case)
    with torch.no_grad():
        v = ours_plain(model, case, inputs)
        stock = theirs(network, case, inputs, inputs.x, inputs.timestep)
        exact = theirs(plain.wide_sinusoid(network, case), case, inputs, inputs.x, inputs.timestep)
    bound = WIDE_SINUSOID_BOUND
    assert_close("velocity, diffusers as it is", stock * generated, v * generated, rel=STOCK_BOUND)
    assert_close("velocity, sinusoid in fp64", exact * generated, v * generated, rel=bound, row=10 * bound)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_tangent_equals_jvp_of_the_fp64_twin(name, dtype, groups):
    """In fp64 nothing hides behind rounding: a wrong term of any size shows."""
    case = CASES[name]
    network, inputs = plain.diffusers_network(case), inputs_of(case)
    twin, model = plain.wide_twin(network, case), plain.our_network(network, case, groups, dtype=dtype)
    wide, generated = inputs.double(), ~known_of(case)
    bounds = (WIDE_SINUSOID_BOUND, TANGENT_BOUND) if dtype == torch.float32 else (1e-12, 1e-12)

    def function(x, timestep):
        return theirs(twin, case, wide, x, timestep)

    with torch.no_grad(), plain.float_means_double(), sdpa_kernel(SDPBackend.MATH):
        v, t_v = torch.func.jvp(function, (wide.x, wide.timestep), (wide.t_x, wide.t_timestep))
    with torch.no_grad():
        primal, tangent = ours_dual(model, case, inputs if dtype == torch.float32 else wide)
    assert_close("primal", v * generated, primal * generated, rel=bounds[0])
    assert_close("tangent", t_v * generated, tangent * generated, rel=bounds[1], row=10 * bounds[1])


@pytest.mark.parametrize("name", ["flf2v", "ti2v"])
def test_gradient_of_every_parameter_equals_diffusers(name, groups):
    """Through the dual pass (primal recomputed) and through the plain one, under each recompute policy."""
    case = CASES[name]
    network, inputs = plain.diffusers_network(case), inputs_of(case)
    twin, model, wide = plain.wide_twin(network, case), plain.our_network(network, case, groups), inputs.double()
    with plain.float_means_double():
        (theirs(twin, case, wide, wide.x, wide.timestep) * wide.loss_weight).sum().backward()
    reference = {key: parameter.grad for key, parameter in twin.named_parameters()}
    passes = {
        "dual": ("full", lambda model, inputs: ours_dual(model, case, inputs)[0]),
        "dual, attention kept": ("attention", lambda model, inputs: ours_dual(model, case, inputs)[0]),
        "plain, recomputed": ("full", lambda model, inputs: ours_plain(model, case, inputs)),
        "plain, attention kept": ("attention", lambda model, inputs: ours_plain(model, case, inputs)),
        "plain, partly recomputed": ("selective", lambda model, inputs: ours_plain(model, case, inputs)),
        "plain, kept": ("none", lambda model, inputs: ours_plain(model, case, inputs)),
    }
    for label, (recompute, forward) in passes.items():
        model.recompute = recompute
        gradients = plain.parameter_gradients(model, case, forward, inputs)
        assert gradients.keys() == reference.keys()
        for key, gradient in reference.items():
            assert_close(f"{label} pass, gradient of {key}", gradient, gradients[key], rel=GRADIENT_BOUND)


def test_given_frames_come_out_as_they_went_in(groups):
    """The x0 of a given frame is the frame, whatever the network, at every time; and its F has the tangent of a fixed x0."""
    case = CASES["ti2v"]
    model, inputs = plain.our_network(plain.diffusers_network(case), case, groups), inputs_of(case)
    shard, known = model.layout.shard, known_of(case).expand_as(inputs.x)
    t = trigflow.to_trigflow(inputs.timestep.double() / 1000)[None, :, None]
    xt, t_xt, t_t = shard(inputs.x).double(), shard(inputs.t_x).double(), t.cos() * t.sin()
    x_in, timestep, t_x_in, t_timestep = trigflow.precondition_jvp(xt, t, t_xt, t_t)
    times = Dual.pack(timestep[..., 0], t_timestep[..., 0])
    with torch.no_grad():
        text = inputs.text.transpose(0, 1).contiguous()
        v = model(Dual.pack(x_in, t_x_in), times, text, condition_of(model, case, inputs))
    x0 = model.layout.unpatchify(trigflow.denoised(xt, v.primal, t))
    assert_close("given frames", inputs.x0[known], x0[known], rel=1e-6)
    F, t_F = trigflow.velocity_jvp(xt, v.primal, t, t_xt, v.tangent, t_t)
    fixed = t.cos() * t_xt - t.sin() * t_t * xt - t.cos() * t_t * F - t.sin() * t_F  # d/dt of cos xt - sin F = x0
    fixed = model.layout.unpatchify(fixed)
    assert float(fixed[known].abs().max()) < 1e-5
    assert float(fixed[~known].abs().max()) > 0.1


def test_a_sample_of_which_nothing_is_given_is_as_without_a_condition(groups):
    case = replace(CASES["ti2v"], given=(0, 0, 0))
    model, inputs = plain.our_network(plain.diffusers_network(case), case, groups), inputs_of(case)
    with torch.no_grad():
        assert_close("velocity", plain.ours_plain(model, inputs), ours_plain(model, case, inputs), rel=1e-6)


def test_a_condition_repeats_and_divides_as_the_batch_does():
    whole = Condition(torch.randn(4, 2, 3), torch.tensor([1, 2]), None, torch.randn(7, 2, 5))
    double = whole.repeated(2)
    assert torch.equal(double.frames_B, torch.tensor([1, 2, 1, 2])) and double.channels_SBE is None
    for name in ("x0_SBP", "image_LBD"):
        assert torch.equal(getattr(double, name), torch.cat([getattr(whole, name)] * 2, dim=1))
    for rows in (slice(0, 2), torch.tensor([2, 3])):
        part = double.rows(rows)
        for name in ("x0_SBP", "frames_B", "image_LBD"):
            assert torch.equal(getattr(part, name), getattr(whole, name))
        assert part.channels_SBE is None
    assert Condition().rows(slice(0, 2)).frames_B is None


def test_a_condition_that_the_network_does_not_take_is_refused(groups):
    case = CASES["wan2.1_i2v"]
    model, inputs = plain.our_network(plain.diffusers_network(case), case, groups), inputs_of(case)
    shard, text = model.layout.shard, inputs.text.transpose(0, 1).contiguous()

    def run(condition):
        return model(shard(inputs.x), inputs.timestep[None], text, condition)

    whole = condition_of(model, case, inputs)
    with pytest.raises(ValueError, match=r"image_LBD is missing.*model\.image_dim=14"):
        run(None)
    with pytest.raises(ValueError, match=r"channels_SBE is missing.*model\.condition_channels=7"):
        run(replace(whole, channels_SBE=None))
    with pytest.raises(AssertionError, match="takes no given frames"):
        run(replace(whole, x0_SBP=shard(inputs.x0), frames_B=torch.tensor([1, 1])))
    case = plain.CASES["odd_grid"]
    model = plain.our_network(plain.diffusers_network(case), case, groups)
    x, text = model.layout.shard(torch.zeros(2, *case.latent.shape_CTHW)), torch.zeros(3, 2, case.model.text_dim)
    with pytest.raises(ValueError, match=r"channels_SBE was given.*condition_channels=0"):
        model(x, torch.ones(1, 2), text, Condition(channels_SBE=x))


def test_vectors_of_each_token_run_without_fused_kernels(monkeypatch):
    """The kernels take one vector a sample; of each token's they would refuse the shape."""

    def refuse(op, x):
        raise AssertionError(f"asked for the kernel of {op}")

    monkeypatch.setattr(dual_ops, "kernel_for", refuse)
    x, shift, scale = torch.randn(3, 5, 2, 8).unbind(0)
    normed = torch.nn.functional.layer_norm(x, (8,), eps=1e-6)
    got = dual_ops.layer_norm_modulate(x, shift, scale, eps=1e-6, dtype=torch.float32)
    assert_close("modulated", normed * (1 + scale) + shift, got, rel=1e-6)
    assert_close("gated", x + shift * scale, dual_ops.gated_residual(x, shift, scale), rel=1e-6)
    with pytest.raises(AssertionError, match="layer_norm_modulate"):
        dual_ops.layer_norm_modulate(x, shift[:1], scale[:1], eps=1e-6, dtype=torch.float32)
