"""Networks of two times against diffusers' classes with a second embedder of time: velocity, tangent, gradients; and where they start.

The oracle is diffusers' network in fp64 whose time embedder is asked twice, of the time and, with weights of its own, of the interval; the
outputs are summed (NVlabs/FastGen's form). torch.func.jvp takes its tangent in latents, time and interval.
"""

import copy
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel

from rcm_megatron.config import ParallelConfig
from rcm_megatron.dual import Dual
from rcm_megatron.errors import CheckpointError
from rcm_megatron.inputs import Condition
from rcm_megatron.platform.device import init_distributed
from rcm_megatron.platform.megatron import prepare_megatron
from tests.helpers import assert_close
from tests.unit import test_cosmos_model, test_wan_model

FAMILIES = {
    "wan": (test_wan_model, test_wan_model.CASES["odd_grid"]),
    "cosmos": (test_cosmos_model, test_cosmos_model.CASES["video_odd"]),
}
TIMES, INTERVALS = (987.654, 31.25, 640.5), (987.654, 0.0, 200.125)


@pytest.fixture(scope="module")
def groups():
    prepare_megatron()
    from megatron.core import parallel_state

    from rcm_megatron.parallel.groups import initialize_parallel

    init_distributed()
    yield initialize_parallel(ParallelConfig())
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


class BothTimes(torch.nn.Module):
    """diffusers' embedder of time, and a second one of the interval: the sums of what both give."""

    def __init__(self, first):
        super().__init__()
        self.first, self.second, self.interval = first, copy.deepcopy(first), None

    def forward(self, *args, **kwargs):
        asked = tuple(self.interval if self._is_time(value) else value for value in args)
        first, second = self.first(*args, **kwargs), self.second(*asked, **kwargs)
        return (first[0] + second[0], first[1] + second[1], *first[2:])

    def _is_time(self, value):
        return isinstance(value, torch.Tensor) and value.ndim == 1


NAMES = {
    "wan": {
        "interval_embedding.linear_1": "condition_embedder.second.time_embedder.linear_1",
        "interval_embedding.linear_2": "condition_embedder.second.time_embedder.linear_2",
        "interval_projection": "condition_embedder.second.time_proj",
    },
    "cosmos": {
        "interval_embedding.linear_1": "time_embed.second.t_embedder.linear_1",
        "interval_embedding.linear_2": "time_embed.second.t_embedder.linear_2",
        "interval_embedding.norm_weight": "time_embed.second.norm.weight",
    },
}


def theirs_of(family, name):
    start = next(start for start in NAMES[family] if name.startswith(start))
    return NAMES[family][start] + name.removeprefix(start)


def ours_and_twin(family, groups, dtype):
    """This program's network of two times with random weights, and diffusers' in fp64 with the same."""
    from rcm_megatron.checkpoint.second_time import second_time_names, with_second_time
    from rcm_megatron.checkpoint.sources import source_from_tensors
    from rcm_megatron.networks.build import build_chunks
    from rcm_megatron.networks.weights import load_weights

    module, case = FAMILIES[family]
    network = module.diffusers_network(case)
    twin, attribute = module.wide_twin(network, case), {"wan": "condition_embedder", "cosmos": "time_embed"}[family]
    setattr(twin, attribute, BothTimes(getattr(twin, attribute)))
    model = replace(case.model, second_time=True)
    start = with_second_time(source_from_tensors(network.state_dict()), model)
    (ours,) = chunks = build_chunks(model, case.latent, ParallelConfig(), groups=groups, params_dtype=dtype)
    load_weights(chunks, start)
    generator, own = torch.Generator().manual_seed(4), dict(ours.named_parameters())
    for name in second_time_names(model):
        value = torch.randn(own[name].shape, generator=generator) / own[name].shape[-1] ** 0.5
        own[name].data.copy_(value)
        dict(twin.named_parameters())[theirs_of(family, name)].data.copy_(value)
    return ours, twin, attribute, case


class Given:
    """Random inputs with tangents; weights of a loss."""

    def __init__(self, case, dtype):
        generator = torch.Generator().manual_seed(5)
        shape = (case.batch, *case.latent.shape_CTHW)
        self.x, self.t_x, self.weight = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
        self.text = torch.randn(case.batch, case.text, case.model.text_dim, generator=generator).to(dtype)
        self.time, self.interval = (torch.tensor(v[: case.batch]).to(dtype) for v in (TIMES, INTERVALS))
        self.t_time, self.t_interval = (10 * torch.randn(case.batch, generator=generator).to(dtype) for _ in range(2))


def ours_dual(model, given):
    shard, text = model.layout.shard, given.text.transpose(0, 1).contiguous()
    times = Dual.pack(given.time[None], given.t_time[None])
    interval = Dual.pack(given.interval[None], given.t_interval[None])
    v = model(Dual.pack(shard(given.x), shard(given.t_x)), times, text, interval_1B=interval)
    return model.layout.unpatchify(v.primal), model.layout.unpatchify(v.tangent)


def theirs(family, twin, attribute, case, given):
    """v of (x, time, interval) in fp64."""
    text, unit = given.text.double(), 1000 if family == "cosmos" else 1

    def function(x, time, interval):
        getattr(twin, attribute).interval = interval / unit
        if family == "wan":
            return twin(x, time, text).sample
        mask = x.new_zeros(1, 1, *x.shape[-2:])
        return twin(x, time / unit, text, fps=case.model.rope_fps, padding_mask=mask).sample

    return function


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-11), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
def test_velocity_tangent_and_gradients(family, dtype, bound, groups):
    from rcm_megatron.checkpoint.second_time import second_time_names
    from rcm_megatron.checkpoint.translate import from_internal

    ours, twin, attribute, case = ours_and_twin(family, groups, dtype)
    module, given = FAMILIES[family][0], Given(case, dtype)
    function = theirs(family, twin, attribute, case, given)
    points = tuple(value.double() for value in (given.x, given.time, given.interval))
    tangents = tuple(value.double() for value in (given.t_x, given.t_time, given.t_interval))
    with module.float_means_double(), sdpa_kernel(SDPBackend.MATH):
        with torch.no_grad():
            v, t_v = torch.func.jvp(function, points, tangents)
        (function(*points) * given.weight.double()).sum().backward()
    primal, tangent = ours_dual(ours, given)
    assert_close("velocity", v, primal, rel=bound)
    assert_close("tangent", t_v, tangent, rel=bound)
    (primal * given.weight).sum().backward()
    expected = {name.replace(f"{attribute}.first.", f"{attribute}."): p.grad for name, p in twin.named_parameters()}
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    second = second_time_names(ours.model)
    found = {theirs_of(family, name): gradients.pop(name) for name in second}
    found |= dict(from_internal(gradients, case.model, "diffusers"))
    assert found.keys() == {name for name, value in expected.items() if value is not None}
    for name, value in found.items():
        assert_close(f"gradient of {name}", expected[name], value, rel=bound)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_start_is_the_network_of_one_time_to_the_bit_and_learns(family, groups):
    """At every interval; plain and dual. Then each parameter that a second time adds gets a gradient within two steps."""
    from rcm_megatron.checkpoint.second_time import second_time_names, with_second_time
    from rcm_megatron.checkpoint.sources import source_from_tensors
    from rcm_megatron.networks.build import build_chunks
    from rcm_megatron.networks.weights import load_weights, seeded_weights

    module, case = FAMILIES[family]
    source, model = (
        source_from_tensors(module.diffusers_network(case).state_dict()),
        replace(case.model, second_time=True),
    )
    options = {"groups": groups, "params_dtype": torch.float32}
    (one,), (two,) = (build_chunks(m, case.latent, ParallelConfig(), **options) for m in (case.model, model))
    load_weights([one], source)
    load_weights([two], with_second_time(source, model))
    given, own = Given(case, torch.float32), dict(two.named_parameters())
    for name in second_time_names(model):
        if name.startswith("interval_embedding.linear_1"):
            assert torch.equal(own[name], own[name.replace("interval", "time")])
        else:
            assert not own[name].any(), name
    text = given.text.transpose(0, 1).contiguous()
    x = Dual.pack(one.layout.shard(given.x), one.layout.shard(given.t_x))
    times = Dual.pack(given.time[None], given.t_time[None])
    with torch.no_grad():
        expected, v = one(x, times, text), ours_dual(two, given)
        assert torch.equal(one.layout.unpatchify(expected.primal), v[0])
        assert torch.equal(one.layout.unpatchify(expected.tangent), v[1])
        plain = [network(one.layout.shard(given.x), given.time[None], text) for network in (one, two)]
        assert torch.equal(*plain)
    for _ in range(3):
        two.zero_grad()
        (ours_dual(two, given)[0] * given.weight).sum().backward()
        with torch.no_grad():
            for parameter in two.parameters():
                parameter -= 1e-3 * parameter.grad
    still = [name for name in second_time_names(model) if not own[name].grad.any()]
    assert not still, f"{still} never learn"
    seeded = seeded_weights(model, seed=3)
    assert not any(seeded[name].any() for name in second_time_names(model) if "embedding.linear_1" not in name)


def test_given_frames_go_nowhere(groups):
    """A network of given frames (Video2World): their tokens do not depend on the interval, and the map keeps them."""
    from rcm_megatron.diffusion import flow_maps, trigflow
    from rcm_megatron.networks.build import build_chunks
    from rcm_megatron.networks.inputs import network_input
    from rcm_megatron.networks.weights import load_weights, seeded_weights

    case = test_cosmos_model.CASES["video2world"]
    model = replace(case.model, second_time=True)
    (network,) = build_chunks(model, case.latent, ParallelConfig(), groups=groups, params_dtype=torch.float32)
    load_weights([network], seeded_weights(model, seed=1))
    layout, generator = network.layout, torch.Generator().manual_seed(2)
    x0, noise = (torch.randn(case.batch, *case.latent.shape_CTHW, generator=generator) for _ in range(2))
    text = torch.randn(case.text, case.batch, model.text_dim, generator=generator)
    x0_SBP, noise_SBP = layout.shard(x0), layout.shard(noise)
    t, s = (torch.tensor(v, dtype=torch.float64)[None, :, None] for v in ((1.4, 0.9, 1.2), (0.5, 0.0, 1.0)))
    condition = Condition(x0_SBP=x0_SBP, frames_B=torch.tensor(case.given))
    given = network_input(trigflow.add_noise(x0_SBP, noise_SBP, t), t, text, condition, s_1B1=s)
    with torch.no_grad():
        v = network(given.x_SBP, given.timestep_1B, given.text_LBD, condition, given.interval_1B)
    xt = trigflow.add_noise(x0_SBP, noise_SBP, t)
    mapped = layout.unpatchify(flow_maps.flow_map(xt, trigflow.velocity(xt, v, t), t, s))
    line = layout.unpatchify(trigflow.add_noise(x0_SBP, noise_SBP, s))
    for i, frames in enumerate(case.given):
        assert_close("given frames", line[i, :, :frames], mapped[i, :, :frames], rel=1e-6) if frames else None
        assert float((line[i, :, frames:] - mapped[i, :, frames:]).norm()) > 0.1
    # once it has learned, the embedding of a given frame is that of no interval, and of no other frame
    with torch.no_grad():
        for parameter in network.interval_embedding.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        (e_FBD, *_), _ = network._embed(given.timestep_1B, given.text_LBD, condition, given.interval_1B)
        (still_FBD, *_), _ = network._embed(given.timestep_1B, given.text_LBD, condition, 0 * given.interval_1B)
    for i, frames in enumerate(case.given):
        assert torch.equal(e_FBD[:frames, i], still_FBD[:frames, i])
        assert float((e_FBD[frames:, i] - still_FBD[frames:, i]).norm() / still_FBD[frames:, i].norm()) > 1e-2


def test_formats_of_others_refuse_it_and_ours_hold_it(tmp_path):
    """Key maps, convert with and without --second-time, and reading it back."""
    from rcm_megatron.checkpoint.convert import convert
    from rcm_megatron.checkpoint.models import write_checkpoint
    from rcm_megatron.checkpoint.second_time import second_time_names
    from rcm_megatron.checkpoint.sources import open_checkpoint
    from rcm_megatron.networks.weights import seeded_weights
    from rcm_megatron.requests import ConvertRequest

    for family, (_, case) in FAMILIES.items():
        model, folder = case.model, tmp_path / family
        write_checkpoint(seeded_weights(model, seed=2).items(), model, folder / "one")
        wanted = {"source": str(folder / "one"), "second_time": True}
        with pytest.raises(CheckpointError, match="second_time=true.*convert --to internal"):
            convert(ConvertRequest(**wanted, target=str(folder / "no"), to="diffusers"), progress=False)
        found = convert(ConvertRequest(**wanted, target=str(folder / "two"), to="internal"), progress=False)
        assert (
            found == replace(open_checkpoint(folder / "one").model_config(), second_time=True)
            and not (folder / "no").exists()
        )
        convert(
            ConvertRequest(source=str(folder / "two"), target=str(folder / "dist"), to="torch_dist"), progress=False
        )
        for name in ("two", "dist"):
            source = open_checkpoint(folder / name)
            assert source.model_config() == found
            expected = seeded_weights(found, seed=2)
            assert source.keys() == expected.keys() and second_time_names(found)[0] in source
            for key, value in expected.items():
                assert torch.equal(source[key], value), key
        with pytest.raises(CheckpointError, match="it is of two times already"):
            again = ConvertRequest(
                source=str(folder / "two"), second_time=True, target=str(folder / "x"), to="internal"
            )
            convert(again, progress=False)
