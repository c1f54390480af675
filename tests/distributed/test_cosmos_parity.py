"""Cosmos-Predict2 on several layouts against one rank: losses, tangents and raw gradients, as test_parity does for Wan.

45 tokens need padding on 2 and 4 ranks; stages have different numbers of blocks. Learned positions are on: they are replicated over stages
and token shards.
"""

from dataclasses import replace

import pytest
import torch

from rcm_megatron.config import ParallelConfig
from tests.distributed import test_parity
from tests.distributed.harness import run_ranks
from tests.distributed.layouts import Layout
from tests.helpers import assert_close
from tests.networks import cosmos

MODEL = cosmos(
    num_layers=3,
    ffn_hidden_size=96,
    text_len=5,
    rope_fps=16.0,
    max_size=(4, 8, 12),
    learnable_positions=True,
)
OBJECTIVES = ("scm", "dmd", "fake_score")
LAYOUTS = (Layout(tp=2, ring=2), Layout(pp=2))


def measure(parallel):
    test_parity.MODEL = MODEL  # in this rank's own process
    micro_batch, layers = test_parity.MICRO_BATCH, MODEL.num_layers
    return test_parity.measure(parallel, micro_batch, torch.float32, OBJECTIVES, layers)


@pytest.fixture(scope="module")
def one_rank():
    return run_ranks(measure, 1, {})[0]


@pytest.mark.parametrize("layout", LAYOUTS, ids=[layout.name for layout in LAYOUTS])
def test_layout(one_rank, layout):
    ranks = run_ranks(measure, layout.processes, layout.parallel)
    test_parity.assert_equal_quantities(one_rank, ranks)


VIDEO2WORLD = replace(MODEL, learnable_positions=False, conditional_frames=True)


def measure_video2world(parallel, dtype=torch.float32):
    """As `measure`, each sample given 0, 1 or 2 of its 3 latent frames; and how the frames come back from a rollout."""
    plain, build, built = test_parity.samples_of, test_parity.build, []

    def with_condition(networks, *args):
        return plain(networks, *args).with_conditional_frames((0, 1, 2))

    def build_once(*args, **options):
        built.append(build(*args, **options))
        return built[0]

    test_parity.MODEL, test_parity.samples_of, test_parity.build = VIDEO2WORLD, with_condition, build_once
    measured = test_parity.measure(parallel, test_parity.MICRO_BATCH, dtype, OBJECTIVES, MODEL.num_layers)
    (networks,) = built
    samples = with_condition(networks, 4, test_parity.MICRO_BATCH)
    rollout = test_parity.work_of("dmd", networks, samples, iteration=2).rollout()
    frames = networks.layout.grid_indices()[0][: networks.layout.valid_local]
    error = (rollout.G_SBP - samples.x0_SBP).abs()[: len(frames)][frames[:, None] < samples.condition.frames_B]
    return measured, float(error.max()) if len(error) else 0.0, len(error)


@pytest.fixture(scope="module")
def video2world():
    return run_ranks(measure_video2world, 1, {})[0]


def test_video2world(one_rank, video2world):
    """Given frames leave a rollout as they entered, on every layout, and losses and gradients are those of one rank."""
    reference, worst, given = video2world
    assert given > 0
    assert worst < 1e-5
    assert not torch.equal(reference["scm"]["loss of scm"], one_rank["scm"]["loss of scm"])
    results = run_ranks(measure_video2world, 4, {"tp": 2, "pp": 2})
    test_parity.assert_equal_quantities(reference, [measured for measured, _, _ in results])
    assert max(worst for _, worst, _ in results) < 1e-5


def test_video2world_in_bf16(video2world):
    """Finite, close in direction to fp32, and given frames come back in fp32."""
    measured, worst, _ = run_ranks(measure_video2world, 2, {"pp": 2}, torch.bfloat16)[0]
    assert worst < 1e-5
    for objective in OBJECTIVES:
        names = [name for name in measured[objective] if name.startswith("gradient of ")]
        expected, got = (torch.cat([d[objective][n].flatten() for n in names]) for d in (video2world[0], measured))
        assert bool(torch.isfinite(got).all()), objective
        cosine = float(torch.nn.functional.cosine_similarity(expected, got, dim=0))
        assert cosine > 0.95, f"{objective}: cosine {cosine:.3f}"


def dmd_of_given_frames():
    """(loss of each sample, the same by hand over the frames that the networks make, and diluted by those that they are given)."""
    from rcm_megatron.objectives.plan import plan_step
    from rcm_megatron.training.step import accumulate_step

    test_parity.MODEL = VIDEO2WORLD
    networks = test_parity.build(ParallelConfig(), torch.float32, num_layers=2)
    samples = test_parity.samples_of(networks, 2, test_parity.MICRO_BATCH).with_conditional_frames((0, 1, 2))
    distillation, stage = test_parity.distillation_of(), test_parity.stage_of({"dmd": 1.0})
    step = plan_step(stage, 2, max_rollout_steps=2)
    settings = {"stage": stage, "distillation": distillation, "objectives": {}}
    result = accumulate_step(step, networks, samples, **settings)["dmd"]
    names = ("G_x0", "x0_theta_fake", "x0_theta_teacher")
    G, fake, teacher = (networks.layout.gather(result.outputs[name]) for name in names)
    by_hand, diluted = [], []
    for b, given in enumerate(samples.condition.frames_B.tolist()):
        made = (part[b, :, given:] for part in (G, fake, teacher))
        g, f, t = made
        by_hand.append((((f - t) / (g - t).abs().mean()) ** 2).sum())
        diluted.append((((f - t) / (G[b] - teacher[b]).abs().mean()) ** 2).sum())
    return result.loss_B, torch.stack(by_hand), torch.stack(diluted), samples.condition.frames_B


def test_given_frames_do_not_dilute_dmds_normaliser():
    ((loss_B, by_hand, diluted, frames_B),) = run_ranks(dmd_of_given_frames, 1)
    with_frames = frames_B > 0
    assert with_frames.any() and not with_frames.all()
    assert_close("loss", by_hand, loss_B, rel=1e-4)  # given frames come back rounded to fp32, and are in the sum
    assert float((diluted / by_hand)[with_frames].min()) > 2  # of one frame in three: (3 / 2)^2
