"""Encoders in a run on several ranks: one rank loads the text encoder for all; training, previews and `sample` with Wan's classes."""

import pytest
import torch
from safetensors.torch import load_file

from rcm_megatron.config import load_config
from rcm_megatron.requests import SampleRequest
from tests.distributed.harness import run_ranks
from tests.distributed.tiny_run import train
from tests.distributed.wan_run import LATENT, TEXT_DIM, TEXT_LEN, write_wan_run

PROMPTS = ("a cat and a dog", "Baking “cake”")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """run.yaml of a tiny Wan with its encoders."""
    return write_wan_run(tmp_path_factory.mktemp("wan_run"))


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
    for name, embed in first.items():
        assert (embed is None) == (name == "null of the student")
        assert embed is None or torch.equal(embed, second[name]), name
    assert first["captions"].shape == (TEXT_LEN, 3, TEXT_DIM)
    assert torch.equal(first["prompts of the teacher"], first["captions"][:, [0, 0, 1, 1]])  # two copies of each
    assert torch.equal(first["null of the teacher"], first["captions"][:, 2:])
    assert torch.equal(first["null of the teacher"], first["null of training"])
    assert not torch.equal(first["null of the teacher"], first["another null"])


def encode(config):
    """What training and `sample` condition on, and whether this rank has loaded UMT5."""
    import dataclasses
    from pathlib import Path

    from rcm_megatron.inference.encoding import encode_captions, load_null_text
    from rcm_megatron.inference.sample import _conditions
    from rcm_megatron.models.encoders.t5 import UMT5TextEncoder

    loaded, load = [], UMT5TextEncoder.__init__
    UMT5TextEncoder.__init__ = lambda self, *args, **options: (loaded.append(self), load(self, *args, **options))[1]
    run = load_config(config)
    request = SampleRequest(weights="teacher", output=Path("unused"), steps=2, prompts=PROMPTS, copies=2)
    captions = encode_captions(run, [*PROMPTS, None])
    _, prompts, null = _conditions(run, request)
    _, _, null_of_student = _conditions(run, dataclasses.replace(request, weights="ema"))
    found = {
        "captions": captions,
        "prompts of the teacher": prompts,
        "null of the teacher": null,
        "null of the student": null_of_student,
        "null of training": load_null_text(run),
        "another null": encode_captions(load_config(config, ["encoders.negative_prompt=a dog"]), [None]),
    }
    return found, bool(loaded)


def test_train_preview_and_sample_with_wans_encoders(tiny, tmp_path):
    """On two ranks; the MP4 of a prompt shows what the VAE makes of the student's latents."""
    overrides = [f"output_dir={tmp_path}", "parallel.ring=2", "trainer.stop_after=2", "trainer.sample_every=2"]
    run_ranks(train, 2, str(tiny), overrides)
    assert (tmp_path / "previews" / "0000002" / "ema_2_steps_0.mp4").stat().st_size > 0
    run_ranks(sample_prompts, 2, str(tiny), overrides, str(tmp_path / "videos"))
    names = sorted(path.name for path in (tmp_path / "videos").iterdir())
    stems = ("0000_a-cat-and-a-dog", "0001_baking-cake")
    assert names == [f"{stem}.{kind}" for stem in stems for kind in ("mp4", "safetensors")]
    latent_CTHW = load_file(tmp_path / "videos" / f"{stems[1]}.safetensors")["latent"]
    assert latent_CTHW.shape == tuple(LATENT.values())
    check_video(tiny, tmp_path / "videos" / f"{stems[1]}.mp4", latent_CTHW)


def sample_prompts(config, overrides, output):
    from pathlib import Path

    from rcm_megatron.inference.sample import sample

    sample(load_config(config, overrides), SampleRequest(weights="ema", output=Path(output), steps=2, prompts=PROMPTS))


def check_video(config, path, latent_CTHW):
    from rcm_megatron.data.media import to_frames
    from rcm_megatron.models.encoders import WanVideoEncoder
    from tests.videos import read_mp4

    folder = load_config(config).encoders.folder
    expected = torch.from_numpy(to_frames(WanVideoEncoder(f"{folder}/vae").decode(latent_CTHW[None])[0])).float()
    frames = torch.from_numpy(read_mp4(path)).float()
    assert frames.shape == expected.shape == (5, 4 * 32, 4 * 48, 3)  # small videos are enlarged for the eye
    assert (frames - expected).abs().mean() < 10, "more than what the codec loses"


def test_a_missing_folder_is_refused_before_training_or_sampling(tiny, capsys):
    from rcm_megatron.cli.main import main

    for argv in (["train", str(tiny)], ["sample", str(tiny), "--prompt", "a cat", "--output", "/nowhere/videos"]):
        assert main([*argv, "encoders.folder=/nowhere"]) == 2
        message = capsys.readouterr().err
        for part in ("vae", "text_encoder", "tokenizer/tokenizer.json"):
            assert f"/nowhere/{part} is" in message
        assert "need a diffusers checkpoint" in message and "Traceback" not in message
