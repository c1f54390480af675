"""Encoders in a run on several ranks: one rank loads the text encoder for all; training, previews and `sample` with Wan's classes."""

import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from rcm_megatron.config import load_config
from tests.distributed.harness import run_ranks
from tests.distributed.tiny_run import tiny_config, train
from tests.helpers import assert_close
from tests.wan_encoders import write_encoders

TEXT_DIM, TEXT_LEN = 16, 12
LATENT = {"channels": 16, "frames": 2, "height": 4, "width": 6}
PROMPTS = ("a cat and a dog", "Baking “cake”")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """run.yaml of a tiny Wan with its encoders: random teacher, random latents."""
    from rcm_megatron.checkpoint.convert import export_diffusers
    from rcm_megatron.data.shards import ShardWriter
    from rcm_megatron.training.networks import seeded_weights

    folder = tmp_path_factory.mktemp("wan_run")
    write_encoders(folder / "wan", text_dim=TEXT_DIM)
    config = tiny_config(folder)
    shape = {"in_channels": 16, "out_channels": 16, "patch_size": [1, 2, 2], "text_dim": TEXT_DIM, "text_len": TEXT_LEN}
    config |= {"model": config["model"] | shape, "latent": LATENT}
    config["encoders"] = {"video": "wan_vae", "text": "umt5", "folder": str(folder / "wan")}
    config["sampling"] = {"num_samples": 1, "student_steps": [2], "teacher_steps": 2}
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    model = load_config(folder / "run.yaml").model
    export_diffusers(seeded_weights(model, seed=5).items(), model, folder / "teacher")
    generator = torch.Generator().manual_seed(0)
    with ShardWriter(folder / "data", samples_per_shard=8, member_format="pt") as writer:
        for index in range(8):
            latent_CTHW = torch.randn(tuple(LATENT.values()), generator=generator)
            embed_LD = torch.randn(5, TEXT_DIM, generator=generator)
            writer.add(f"{index:04d}", latent_CTHW=latent_CTHW, embed_LD=embed_LD, prompt=f"number {index}")
    return folder / "run.yaml"


def test_a_first_rank_computes_for_its_group():
    for rank, (whole, part, calls, errors) in enumerate(run_ranks(share, 3)):
        assert torch.equal(whole, torch.arange(6.0).to(torch.bfloat16).view(2, 3))
        assert part is None if rank == 0 else part.tolist() == [1]
        assert calls == {0: 1, 1: 1, 2: 0}[rank]
        assert errors[0] == ("ValueError", "unknown word 'jumping'")
        assert errors[1] == (("KeyError", "'x'") if rank == 0 else ("RuntimeError", "first rank: KeyError('x')"))


def share():
    import torch.distributed as dist

    from rcm_megatron.parallel.broadcast import computed_once

    calls, cpu = [], torch.device("cpu")

    def compute(value):
        calls.append(value)
        return value

    def fail(error):
        raise error

    whole = computed_once(lambda: compute(torch.arange(6.0).to(torch.bfloat16).view(2, 3)), device=cpu)
    last_two = dist.new_group([1, 2])
    part = None
    if dist.get_rank() > 0:
        part = computed_once(lambda: compute(torch.tensor([dist.get_rank()])), device=cpu, group=last_two)
    errors = []
    for error in (ValueError("unknown word 'jumping'"), KeyError("x")):
        with pytest.raises(Exception) as caught:
            computed_once(lambda error=error: fail(error), device=cpu)
        errors.append((type(caught.value).__name__, str(caught.value)))
    return whole, part, len(calls), errors


def test_one_rank_loads_the_text_encoder_for_all(tiny):
    (first, loaded), (second, loaded_by_second) = run_ranks(encode, 2, str(tiny))
    assert (loaded, loaded_by_second) == (True, False)
    assert first.shape == (TEXT_LEN, 3, TEXT_DIM) and torch.equal(first, second)
    assert not torch.equal(first[:, 0], first[:, 2])


def encode(config):
    """Embeddings of the prompts and the negative prompt, and whether this rank has imported UMT5."""
    from rcm_megatron.training.encoding import encode_captions

    embed_LND = encode_captions(load_config(config), [*PROMPTS, None])
    return embed_LND, "transformers.models.umt5.modeling_umt5" in sys.modules


def test_train_preview_and_sample_with_wans_encoders(tiny, tmp_path):
    """Two layouts: the student's MP4 of a prompt shows what the VAE makes of its latents, which do not depend on the layout."""
    latents = {}
    for name, ranks, overrides in (("one", 1, []), ("ring2", 2, ["parallel.ring=2"])):
        out = tmp_path / name
        overrides = [f"output_dir={out}", *overrides, "trainer.stop_after=2", "trainer.sample_every=2"]
        run_ranks(train, ranks, str(tiny), overrides, timeout=200)
        run_ranks(sample_prompts, ranks, str(tiny), overrides, "ema", str(out / "videos"), PROMPTS)
        previews = out / "previews" / "0000002"
        assert (previews / "ema_2_steps_0.mp4").stat().st_size > 0
        videos = sorted(path.name for path in (out / "videos").iterdir())
        assert videos == [
            f"{stem}.{kind}" for stem in ("0000_a-cat-and-a-dog", "0001_baking-cake") for kind in ("mp4", "safetensors")
        ]
        latents[name] = [load_file(path)["latent"] for path in sorted((out / "videos").glob("*.safetensors"))]
    for one, ring in zip(*latents.values(), strict=True):
        assert one.shape == tuple(LATENT.values())
        assert_close("latents", one, ring, rel=1e-4)
    check_video(tiny, tmp_path / "one" / "videos" / "0001_baking-cake.mp4", latents["one"][1])


def check_video(config, path, latent_CTHW):
    from rcm_megatron.data.media import read_mp4, to_frames
    from rcm_megatron.models.encoders import WanVideoEncoder

    folder = load_config(config).encoders.folder
    expected = torch.from_numpy(to_frames(WanVideoEncoder(f"{folder}/vae").decode(latent_CTHW[None])[0])).float()
    frames = torch.from_numpy(read_mp4(path)).float()
    assert frames.shape == expected.shape == (5, 4 * 32, 4 * 48, 3)  # small videos are enlarged for the eye
    assert (frames - expected).abs().mean() < 10, "more than what the codec loses"


def test_the_teacher_is_guided_by_the_encoders_negative_prompt(tiny, tmp_path):
    names = {}
    for name, overrides in (("own", []), ("other", ["encoders.negative_prompt=a dog"])):
        run_ranks(sample_prompts, 1, str(tiny), overrides, "teacher", str(tmp_path / name), ["a cat"])
        (path,) = (tmp_path / name).glob("*.safetensors")
        names[name] = load_file(path)["latent"]
    assert torch.isfinite(names["own"]).all() and not torch.allclose(names["own"], names["other"])


def sample_prompts(config, overrides, weights, output, prompts):
    from pathlib import Path

    from rcm_megatron.training.sample import SampleRequest, sample

    sample(
        load_config(config, overrides), SampleRequest(weights=weights, output=Path(output), steps=2, prompts=prompts)
    )


def test_a_missing_folder_is_refused_before_training_or_sampling(tiny, capsys):
    from rcm_megatron.__main__ import main

    for argv in (["train", str(tiny)], ["sample", str(tiny), "--prompt", "a cat", "--output", "/nowhere/videos"]):
        assert main([*argv, "encoders.folder=/nowhere"]) == 2
        message = capsys.readouterr().err
        for part in ("vae", "text_encoder", "tokenizer/tokenizer.json"):
            assert f"/nowhere/{part} is" in message
        assert "need a diffusers Wan checkpoint" in message and "Traceback" not in message
