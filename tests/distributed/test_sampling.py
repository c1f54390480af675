"""Samples and exported weights do not depend on the layout: networks from seeds, and a run's checkpoint by the commands."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from rcm_megatron.config import ParallelConfig, load_config
from tests.distributed.harness import run_ranks
from tests.distributed.tiny_run import command, train, write_tiny_run
from tests.helpers import assert_close

CONFIG = "model_configs/quickstart.yaml"
SMALL = (
    "model.num_layers=4",
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
    from rcm_megatron.inference.encoding import encode_captions, load_null_text
    from rcm_megatron.inference.networks import SampleBatches, student_sampling, teacher_sampling
    from rcm_megatron.networks.build import build_chunks
    from rcm_megatron.networks.weights import load_weights, seeded_weights
    from rcm_megatron.parallel.groups import initialize_parallel
    from rcm_megatron.platform.megatron import prepare_megatron

    prepare_megatron()
    run = run_config(**parallel)
    groups = initialize_parallel(run.parallel)
    network = build_chunks(
        run.model, run.latent, run.parallel, groups=groups, params_dtype=torch.float32, recompute="none"
    )
    load_weights(network, seeded_weights(run.model, seed=3))
    batches = SampleBatches(encode_captions(run, CAPTIONS), load_null_text(run), seed=5, batch_size=2)
    samplings = {f"student {steps}": student_sampling(run, steps=steps) for steps in (1, 4)}
    samplings["teacher"] = teacher_sampling(run, steps=3, guidance=2.0)
    return {name: batches.all(network, sampling) for name, sampling in samplings.items()}


@pytest.fixture(scope="module")
def one_rank():
    (samples,) = run_ranks(sample_on_layout, 1, {})
    return samples


def test_samples_follow_noise_and_caption(one_rank):
    for name, latents in one_rank.items():
        assert latents.shape == (3, 1, 3, 12, 20), name
        assert not torch.allclose(latents[0], latents[1]), name
    assert not torch.allclose(one_rank["student 1"], one_rank["student 4"])


@pytest.mark.parametrize(
    "parallel",
    [{"tp": 2}, {"ring": 2}, {}, {"pp": 2, "chunk_layers": (1, 3)}, {"pp": 2, "vpp": 2}],
    ids=["tp2", "ring2", "dp2", "pp2", "pp2_vpp2"],
)
def test_two_ranks_equal_one(one_rank, parallel):
    """Batches of 2 and of 1 samples; each pass holds one micro-batch, fewer than interleaved stages run at once."""
    for rank, samples in enumerate(run_ranks(sample_on_layout, 2, parallel)):
        for name, latents in samples.items():
            assert_close(f"{name}, rank {rank}", one_rank[name], latents, rel=1e-5)


# ---- `python -m rcm_megatron sample` and `export` on a run's checkpoint

PIPELINES = {"pp2": ["parallel.pp=2"], "pp2_vpp2": ["parallel.pp=2", "parallel.vpp=2"]}
WEIGHTS = ("student", "ema", "teacher")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """run.yaml of a run of two iterations."""
    folder = tmp_path_factory.mktemp("trained")
    config = write_tiny_run(folder, num_layers=4)
    run_ranks(train, 1, str(config), ["trainer.stop_after=2"])
    return config


def write_everything(config, ranks, parallel, folder):
    """Samples and exported folders of each kind of weights, under `folder`."""
    for weights in WEIGHTS:
        argv = [
            "sample",
            str(config),
            *parallel,
            "--weights",
            weights,
            "--steps",
            "2",
            "--output",
            str(folder / weights),
        ]
        argv += [part for caption in CAPTIONS for part in ("--prompt", caption)]
        for status, stderr in run_ranks(command, ranks, argv):
            assert status == 0, stderr
    for weights in ("student", "ema", "fake_score"):
        argv = [
            "export",
            str(config),
            *parallel,
            "--weights",
            weights,
            "--verify",
            "--output",
            str(folder / f"{weights}_export"),
        ]
        for status, stderr in run_ranks(command, ranks, argv):
            assert status == 0, stderr


@pytest.fixture(scope="module")
def written_by_one(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    write_everything(trained, 1, [], folder)
    return folder


@pytest.mark.parametrize("layout", PIPELINES)
def test_commands_on_a_pipeline_write_what_one_process_writes(trained, written_by_one, tmp_path, layout):
    """Samples to rounding, exported weights to the bit; `--verify` runs diffusers against the pipeline itself."""
    write_everything(trained, 2, PIPELINES[layout], tmp_path)
    expected = sorted(path.relative_to(written_by_one) for path in written_by_one.rglob("*.safetensors"))
    assert len(expected) == len(WEIGHTS) * len(CAPTIONS) + 3
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.safetensors")) == expected
    for path in expected:
        reference, got = load_file(written_by_one / path), load_file(tmp_path / path)
        assert reference.keys() == got.keys()
        for name, tensor in reference.items():
            if "export" in str(path):
                assert torch.equal(tensor, got[name]), f"{path}: {name}"
            else:
                assert_close(str(path), tensor, got[name], rel=1e-5)
