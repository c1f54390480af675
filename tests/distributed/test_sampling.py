"""Samples do not depend on the layout: student and teacher on one rank, tp=2, ring=2 and dp=2; a run's checkpoint on any of them."""

import dataclasses

import pytest
import torch

from rcm_megatron.config import ParallelConfig, load_config
from tests.distributed.harness import run_ranks
from tests.helpers import assert_close

CONFIG = "model_configs/quickstart.yaml"
SMALL = (
    "model.num_layers=2",
    "model.hidden_size=48",
    "model.num_heads=2",
    "model.ffn_hidden_size=40",
    "latent.height=12",
    "latent.width=20",
    "latent.frames=3",  # 3 * 3 * 5 tokens: one of padding on two ranks
)
CAPTIONS = ("seven moving left", "two moving right", "nine moving left")


def run_config(**parallel):
    return dataclasses.replace(load_config(CONFIG, SMALL), parallel=ParallelConfig(**parallel))


def sample_on_layout(parallel):
    """{name: latents [N, C, T, H, W]} from seeded random weights; imports here, as the harness asks."""
    from rcm_megatron import platform
    from rcm_megatron.parallel.groups import initialize_parallel
    from rcm_megatron.training.encoding import encode_captions, load_null_text
    from rcm_megatron.training.inference import SampleBatches, student_draw, teacher_draw
    from rcm_megatron.training.networks import build_chunks, load_weights, seeded_weights

    platform.install()
    run = run_config(**parallel)
    groups = initialize_parallel(run.parallel)
    network = build_chunks(
        run.model, run.latent, run.parallel, groups=groups, params_dtype=torch.float32, recompute="none"
    )
    load_weights(network, seeded_weights(run.model, seed=3))
    batches = SampleBatches(encode_captions(run, CAPTIONS), load_null_text(run), seed=5, batch_size=2)
    draws = {f"student {steps}": student_draw(run, steps=steps) for steps in (1, 4)}
    draws["teacher"] = teacher_draw(run, steps=3, guidance=2.0)
    return {name: batches.all(network, draw) for name, draw in draws.items()}


@pytest.fixture(scope="module")
def one_rank():
    (samples,) = run_ranks(sample_on_layout, 1, {})
    return samples


def test_samples_follow_noise_and_caption(one_rank):
    for name, latents in one_rank.items():
        assert latents.shape == (3, 1, 3, 12, 20), name
        assert not torch.allclose(latents[0], latents[1]), name
    assert not torch.allclose(one_rank["student 1"], one_rank["student 4"])


@pytest.mark.parametrize("parallel", [{"tp": 2}, {"ring": 2}, {}], ids=["tp2", "ring2", "dp2"])
def test_two_ranks_equal_one(one_rank, parallel):
    for rank, samples in enumerate(run_ranks(sample_on_layout, 2, parallel)):
        for name, latents in samples.items():
            assert_close(f"{name}, rank {rank}", one_rank[name], latents, rel=1e-5)
