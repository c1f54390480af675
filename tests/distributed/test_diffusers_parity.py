"""Each family on TP 2 x ring 2 and on two pipeline stages against diffusers' own class: velocity, and the tangent of torch.func.jvp.

test_parity compares layouts with one rank, the unit tests one rank with diffusers; here nothing lies between the two ends. Networks,
inputs and oracles are those of the unit tests: batches of 2 and 3, 45 tokens and other numbers that need padding, texts of 5 to 512.
Wan's class is given its timestep sinusoid in fp64: its own, in fp32, alone puts the velocity 9.8e-6 off. Measured: velocities within
3.8e-7, tangents within 6.7e-7.
"""

from contextlib import ExitStack

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from rcm_megatron.config import ParallelConfig
from rcm_megatron.dual import Dual
from tests.distributed.harness import run_ranks
from tests.helpers import assert_close
from tests.unit import test_cosmos_model as cosmos
from tests.unit import test_wan_image as wan_image
from tests.unit import test_wan_model as wan

CASES = {
    "wan_t2v": wan.CASES["odd_grid"],
    "wan2.1_i2v": wan_image.CASES["wan2.1_i2v"],
    "wan2.2_i2v": wan_image.CASES["wan2.2_i2v"],
    "wan2.2_ti2v": wan_image.CASES["ti2v"],
    "cosmos_text2image": cosmos.CASES["image"],
    "cosmos_video2world": cosmos.CASES["video2world"],
}
LAYOUTS = {"tp2_ring2": (4, {"tp": 2, "ring": 2}), "pp2": (2, {"pp": 2})}
BOUND = 1e-5


def module_of(name):
    return cosmos if name.startswith("cosmos") else wan if name == "wan_t2v" else wan_image


def inputs_of(name):
    return module_of(name).inputs_of(CASES[name])


def diffusers_network(name):
    return (cosmos if name.startswith("cosmos") else wan).diffusers_network(CASES[name])


def measure(parallel, states):
    """{name: (velocity, tangent), whole} of our networks with the weights of diffusers' on this layout."""
    from rcm_megatron.platform.megatron import prepare_megatron

    prepare_megatron()
    from rcm_megatron.networks.build import build_chunks
    from rcm_megatron.networks.weights import load_weights
    from rcm_megatron.parallel.groups import initialize_parallel
    from rcm_megatron.parallel.pipeline import evaluate

    parallel, measured = ParallelConfig(**parallel), {}
    groups = initialize_parallel(parallel)
    for name, state in states.items():
        case = CASES[name]
        chunks = build_chunks(case.model, case.latent, parallel, groups=groups, params_dtype=torch.float32)
        load_weights(chunks, state)
        v = evaluate(chunks, network_input(name, chunks[0]))
        measured[name] = [chunks[0].layout.gather(half) for half in (v.primal, v.tangent)]
    return measured


def network_input(name, chunk):
    from rcm_megatron.inputs import NetworkInput

    case, inputs, shard, condition = CASES[name], inputs_of(name), chunk.layout.shard, ()
    times = (
        [inputs.timestep, inputs.t_timestep] if module_of(name) is not cosmos else [1000 * inputs.s, 1000 * inputs.t_s]
    )
    if module_of(name) is cosmos:
        condition = cosmos.condition_of(chunk, inputs)
    elif module_of(name) is wan_image:
        condition = (wan_image.condition_of(chunk, case, inputs),)
    time = Dual.pack(*(value.double()[None] for value in times))
    return NetworkInput(
        Dual.pack(shard(inputs.x), shard(inputs.t_x)), time, inputs.text.transpose(0, 1).contiguous(), *condition
    )


def theirs(name, network, inputs):
    """diffusers' velocity as a function of the latent and the time; `inputs` give the rest."""
    case = CASES[name]
    if name == "wan_t2v":
        return lambda x, timestep: network(x, timestep, inputs.text).sample
    return lambda x, time: module_of(name).theirs(network, case, inputs, x, time)


def expected(name):
    """(velocity of the class in fp32, tangent of its twin in fp64)."""
    family, case, network, inputs = module_of(name), CASES[name], diffusers_network(name), inputs_of(name)
    source = cosmos if family is cosmos else wan
    wide = type(inputs)(
        **{k: v.double() if v is not None and v.is_floating_point() else v for k, v in vars(inputs).items()}
    )
    network = network if family is cosmos else wan.wide_sinusoid(network, case)
    fields = ("s", "t_s") if family is cosmos else ("timestep", "t_timestep")
    with torch.no_grad():
        v = theirs(name, network, inputs)(inputs.x, getattr(inputs, fields[0]))
    twin = source.wide_twin(network, case)
    with ExitStack() as stack:
        for context in (torch.no_grad(), source.float_means_double(), sdpa_kernel(SDPBackend.MATH)):
            stack.enter_context(context)
        time, t_time = (getattr(wide, field) for field in fields)
        _, t_v = torch.func.jvp(theirs(name, twin, wide), (wide.x, time), (wide.t_x, t_time))
    return v, t_v


def generated(name, v):
    """`v` where no frame is given: there the network's velocity is not asked for."""
    if module_of(name) is wan_image:
        return v * ~wan_image.known_of(CASES[name])
    return cosmos.generated(inputs_of(name), v) if module_of(name) is cosmos else v


@pytest.fixture(scope="module")
def references():
    return {name: expected(name) for name in CASES}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_velocity_and_tangent_equal_diffusers(references, layout):
    processes, parallel = LAYOUTS[layout]
    states = {name: diffusers_network(name).state_dict() for name in CASES}
    for rank, measured in enumerate(run_ranks(measure, processes, parallel, states)):
        for name, (v, t_v) in measured.items():
            for what, reference, value in zip(("velocity", "tangent"), references[name], (v, t_v), strict=True):
                label = f"{name}: {what} on rank {rank}"
                assert_close(label, generated(name, reference), generated(name, value), rel=BOUND)
