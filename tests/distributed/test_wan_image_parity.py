"""A Wan network with every image condition at once on several layouts against one rank, as test_parity does for text-to-video.

Channels beside the latent's are sharded with its tokens, CLIP tokens (an odd number) are whole on every rank, 0 to 2 of 3 latent frames are
given; 45 tokens need padding on 2 and 4 ranks.
"""

from dataclasses import replace

import pytest
import torch

from rcm_megatron.diffusion.noise import SeededDraws
from rcm_megatron.inputs import Condition
from tests.distributed import test_parity
from tests.distributed.harness import run_ranks
from tests.distributed.layouts import Layout

WAN = {"condition_channels": 4, "image_dim": 7, "image_positions": 9, "conditional_frames": True}
MODEL = replace(test_parity.MODEL, num_layers=4, **WAN)
OBJECTIVES = ("scm", "dmd", "fake_score")
LAYOUTS = (Layout(tp=2, ring=2), Layout(ulysses=2, pp=2), Layout(pp=2, vpp=2))


def condition_of(layout, rows):
    """What is known of the samples ``rows``, on this rank."""
    from rcm_megatron.models.tokens import TokenLayout

    draws, latent = SeededDraws(97, 0, rows), layout.latent_shape
    channels = (MODEL.condition_channels, *latent[1:])
    return Condition(
        x0_SBP=layout.shard(draws.normal("x0", latent)),
        frames_B=(3 * draws.uniform("frames")).long(),
        channels_SBE=TokenLayout(channels, layout.patch, groups=layout.groups).shard(
            draws.normal("channels", channels)
        ),
        image_LBD=draws.normal("image", (MODEL.image_positions, MODEL.image_dim)).transpose(0, 1).contiguous(),
    )


def measure(parallel, dtype=torch.float32):
    from rcm_megatron.dual import Dual
    from rcm_megatron.inputs import NetworkInput
    from rcm_megatron.parallel import pipeline

    plain = test_parity.samples_of

    def with_condition(networks, iteration, micro_batch_size):
        samples = plain(networks, iteration, micro_batch_size)
        condition = condition_of(networks.layout, test_parity.rows_of(networks.layout.groups, micro_batch_size))
        return replace(samples, condition=replace(condition, x0_SBP=samples.x0_SBP))

    def bare_network(networks):
        """v and t_v of the student for random dual inputs, on every rank."""
        layout, draws = networks.layout, SeededDraws(98, 0, range(3))
        x, t_x = (layout.shard(draws.normal(name, layout.latent_shape)) for name in ("x", "t_x"))
        times = Dual.pack(1000 * draws.uniform("t")[None], 1000 * draws.normal_scalar("t_t")[None])
        text = draws.normal("text", (5, 10)).transpose(0, 1).contiguous()
        given = NetworkInput(Dual.pack(x, t_x), times, text, condition_of(layout, range(3)))
        v = pipeline.evaluate(networks["student"], given)
        return {"v": layout.gather(v.primal), "t_v": layout.gather(v.tangent)}

    # In this rank's own process.
    test_parity.MODEL, test_parity.samples_of, test_parity.bare_network = MODEL, with_condition, bare_network
    return test_parity.measure(parallel, test_parity.MICRO_BATCH, dtype, OBJECTIVES, MODEL.num_layers)


@pytest.fixture(scope="module")
def one_rank():
    return run_ranks(measure, 1, {})[0]


def test_every_parameter_has_a_gradient(one_rank):
    from rcm_megatron.checkpoint.translate import internal_shapes

    for objective in OBJECTIVES:
        gradients = {
            n.removeprefix("gradient of "): v for n, v in one_rank[objective].items() if n.startswith("gradient")
        }
        assert gradients.keys() == internal_shapes(MODEL).keys()
        for name, value in gradients.items():
            assert bool(torch.isfinite(value).all()) and float(value.norm()) > 0, f"{objective}: {name}"


@pytest.mark.parametrize("layout", LAYOUTS, ids=[layout.name for layout in LAYOUTS])
def test_layout(one_rank, layout):
    ranks = run_ranks(measure, layout.processes, layout.parallel)
    error, name = test_parity.assert_equal_quantities(one_rank, ranks)
    print(f"{layout.name}: at most {error:.1e} ({name})")


def test_bf16(one_rank):
    """Finite, and close in direction to fp32."""
    measured = run_ranks(measure, 2, {"pp": 2}, torch.bfloat16)[0]
    for objective in OBJECTIVES:
        names = [name for name in measured[objective] if name.startswith("gradient of ")]
        expected, got = (torch.cat([d[objective][n].flatten() for n in names]) for d in (one_rank, measured))
        assert bool(torch.isfinite(got).all()), objective
        cosine = float(torch.nn.functional.cosine_similarity(expected, got, dim=0))
        assert cosine > 0.95, f"{objective}: cosine {cosine:.3f}"
