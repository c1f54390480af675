"""rCM distillation of a tiny Cosmos network, Text2Image and Video2World, through the trainer: the same run on one rank and on others."""

import math

import pytest
import yaml

from rcm_megatron.config import build
from rcm_megatron.families.cosmos.settings import CosmosModelConfig
from rcm_megatron.requests import SampleRequest
from tests.distributed import tiny_run
from tests.distributed.harness import RankError, run_ranks
from tests.distributed.test_training_run import LOSS_BOUND, assert_same_curves
from tests.helpers import assert_close

STEPS = 8
MODEL = {name: value for name, value in tiny_run.MODEL.items() if name != "freq_dim"}
MODEL |= {"family": "cosmos", "adaln_lora_dim": 6, "rope_scale": [1.0, 4.0, 3.0]}
STAGES = [
    {"name": "scm", "steps": 3, "losses": {"scm": 100.0}, "tangent_warmup": 2},
    {"name": "rcm", "steps": 5, "losses": {"scm": 100.0, "dmd": 1.0}, "student_update_freq": 2},
]
LAYOUTS = {"tp2_ring2": (4, ["parallel.tp=2", "parallel.ring=2"]), "pp2": (2, ["parallel.pp=2"])}
STOP = 4
"""Where a run is stopped, to go on elsewhere."""
KINDS = {"text2image": (1, None), "video2world": (4, (1, 2))}
"""Latent frames, and how many of them are given."""


def write_run(folder, kind):
    """Data, a random teacher in diffusers' format, and run.yaml."""
    from rcm_megatron.checkpoint.models import write_checkpoint
    from rcm_megatron.networks.weights import seeded_weights

    folder, (frames, given) = folder / kind, KINDS[kind]
    folder.mkdir()
    fields = MODEL | ({"conditional_frames": True, "rope_fps": 16.0} if given else {})
    write_videos(folder / "data", frames=frames)
    model = build(CosmosModelConfig, fields)
    write_checkpoint(seeded_weights(model, seed=5).items(), model, folder / "teacher")
    config = tiny_run.tiny_config(folder) | {"model": fields, "stages": STAGES}
    config["latent"] |= {"frames": frames}
    config["distillation"] |= {"conditional_frames": None if given is None else list(given)}
    config["encoders"] = {"video": "none", "text": "none"}
    config["data"] |= {"negative_embedding": str(folder / "negative.pt")}
    (folder / "run.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return folder


def write_videos(folder, *, frames):
    """A shard of random latents and embeddings; the negative embedding beside its folder."""
    import torch

    from rcm_megatron.data.shards import ShardWriter

    generator = torch.Generator().manual_seed(1)
    text = (MODEL["text_len"], MODEL["text_dim"])
    with ShardWriter(folder, samples_per_shard=8) as writer:
        for index in range(8):
            latent = torch.randn(1, frames, 16, 16, generator=generator)
            embed = torch.randn(text, generator=generator)
            writer.add(f"{index:03d}", latent_CTHW=latent, embed_LD=embed, prompt=f"video {index}")
    torch.save(torch.randn(text, generator=generator), folder.with_name("negative.pt"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cosmos")
    return {kind: write_run(folder, kind) for kind in KINDS}


def start(folder, name, ranks, overrides):
    """(counters of rank 0, records) of a run of `folder`."""
    overrides = [*overrides, f"output_dir={folder / name}"]
    results = run_ranks(tiny_run.train, ranks, str(folder / "run.yaml"), overrides)
    return results[0][0], tiny_run.records(folder / name)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_run_begun_on_stages_and_ended_on_token_shards(runs, kind):
    counters, lines = start(runs[kind], "one", 1, [])
    assert len(lines) == STEPS
    assert counters["refused_updates"] == 0
    assert counters["updates/student"] + counters["updates/fake_score"] == STEPS
    assert all(math.isfinite(v) for line in lines for v in line.values() if isinstance(v, float))
    assert {"scm/loss", "dmd/loss", "fake_score/loss"} < set().union(*lines)
    ranks, overrides = LAYOUTS["pp2"]
    start(runs[kind], "moved", ranks, [*overrides, f"trainer.stop_after={STOP}", f"trainer.sample_every={STOP}"])
    _, others = start(runs[kind], "moved", *LAYOUTS["tp2_ring2"])
    assert_same_curves(lines, others, rel=LOSS_BOUND)


def sample_continued(folder, given, frames):
    """Sample a student of random weights, as the command does."""
    import torch.distributed as dist

    from rcm_megatron.config import load_config
    from rcm_megatron.inference import sample

    dist.destroy_process_group = lambda: None  # the harness does it
    request = {"weights": "teacher", "output": folder / "samples", "steps": 2, "embeddings": [folder / "negative.pt"]}
    run = load_config(folder / "run.yaml", ["sampling.guidance=2"])
    sample.sample(run, SampleRequest(**request, copies=2, conditional_latent=given, conditional_frames=frames))


def test_samples_of_video2world_continue_the_given_frames(runs):
    import torch
    from safetensors.torch import load_file, save_file

    folder, known = runs["video2world"], torch.randn(1, 3, 16, 16)
    save_file({"latent": known}, folder / "given.safetensors")
    run_ranks(sample_continued, 2, folder, folder / "given.safetensors", 2)
    samples = [load_file(path)["latent"] for path in sorted((folder / "samples").glob("*.safetensors"))]
    assert len(samples) == 2
    for latent in samples:
        assert_close("given frames", known[:, :2], latent[:, :2], rel=1e-5)
    assert not torch.allclose(samples[0][:, 2:], samples[1][:, 2:])
    with pytest.raises(RankError, match="give its latent with --conditional-latent"):
        run_ranks(sample_continued, 1, folder, None, 1)
    with pytest.raises(RankError, match="need 1 to 3"):
        run_ranks(sample_continued, 1, folder, folder / "given.safetensors", 4)
