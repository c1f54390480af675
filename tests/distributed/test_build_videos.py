"""`build-dataset videos` on ranks that are killed, and of videos that cannot be used."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import AutoencoderKLWan

from rcm_megatron.data.manifest import load_manifest
from rcm_megatron.data.samples import SampleSource
from tests.distributed.builds import assert_same, build, interrupted, run
from tests.distributed.harness import run_ranks
from tests.distributed.tiny_run import tiny_config
from tests.helpers import assert_close
from tests.videos import smooth_frames, write_video
from tests.wan_encoders import write_encoders, write_image_encoder

NUM_VIDEOS = 24


@pytest.fixture(scope="module")
def filmed(tmp_path_factory):
    """(arguments of a build from videos with Wan's miniature encoders, folder of it undisturbed, its file operations)."""
    folder = tmp_path_factory.mktemp("videos")
    write_encoders(folder / "wan", text_dim=16)
    config = tiny_config(folder)
    model = {"in_channels": 16, "out_channels": 16, "patch_size": [1, 2, 2], "text_dim": 16, "text_len": 12}
    config |= {"model": config["model"] | model, "latent": {"channels": 16, "frames": 2, "height": 4, "width": 6}}
    config["encoders"] = {"video": "wan_vae", "text": "umt5", "folder": str(folder / "wan")}
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    for number in range(NUM_VIDEOS):
        path = write_video(folder / "clips" / f"{number:02d}.mp4", smooth_frames(16, seed=number))
        if number % 2:
            path.with_suffix(".txt").write_text(f"a cat and {'a dog ' * (number % 3)}")
        else:
            path.with_suffix(".json").write_text(json.dumps({"caption": "baking cake"}))
    (folder / "clips" / "02.mp4").write_bytes((folder / "clips" / "03.mp4").read_bytes()[:500])
    write_video(folder / "clips" / "09.mp4", smooth_frames(4))
    write_video(folder / "clips" / "10.mp4", smooth_frames(16), codec="libx264")
    (folder / "clips" / "13.txt").unlink()
    argv = ["videos", str(folder / "run.yaml"), "--videos", str(folder / "clips"), "--samples-per-shard", "6"]
    ((_, _, operations),) = run(1, [*argv, "--output", str(folder / "one")])
    return argv, folder / "one", operations


def test_videos_become_the_vaes_latents(filmed):
    from rcm_megatron.data.video import ClipReader
    from rcm_megatron.models.encoders import UMT5TextEncoder, WanVideoEncoder

    argv, folder, _ = filmed
    manifest = load_manifest(folder, on_error="raise")
    assert [shard.num_samples for shard in manifest.shards] == [5, 5, 5, 6]
    assert manifest.description["num_skipped"] == 3
    skipped = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    expected = {
        2: "02.mp4: cannot be read",
        9: "09.mp4: got 0.17 s, need 0.25 s",
        13: "no caption",
    }
    assert [int(entry["key"]) for entry in skipped] == list(expected)
    assert all(reason in entry["reason"] for reason, entry in zip(expected.values(), skipped, strict=True)), skipped
    clips, wan = Path(argv[3]), Path(argv[1]).parent / "wan"
    assert (folder / "videos.txt").read_text().splitlines()[11] == "11.mp4"
    shape = {"latent_shape": (16, 2, 4, 6), "text_len": 12, "text_dim": 16}
    source = SampleSource(manifest, seed=0, on_error="raise", **shape)
    loaded = {manifest.record(source[index].row).key: source[index] for index in range(len(manifest))}
    reader = ClipReader(frames=5, height=32, width=48, fps=16.0, device=torch.device("cpu"))
    vae, text_encoder = WanVideoEncoder(wan / "vae"), UMT5TextEncoder(wan, text_len=12, dtype=torch.float32)
    for number, caption in ((0, "baking cake"), (11, "a cat and a dog a dog")):
        sample = loaded[f"{number:09d}"]
        assert sample.prompt == caption
        latent_CTHW = vae.encode(reader.read(clips / f"{number:02d}.mp4")[None])[0]
        assert_close(f"latent {number}", latent_CTHW, torch.from_numpy(sample.latent_CTHW), rel=3e-3)
        embed_LD = text_encoder.encode([caption])[0]
        assert bool((embed_LD[len(sample.embed_LD) :] == 0).all())
        assert_close(f"text {number}", embed_LD[: len(sample.embed_LD)], torch.from_numpy(sample.embed_LD), rel=3e-3)


def test_a_build_from_videos_killed_five_times_gives_the_same_bytes(filmed, tmp_path):
    argv, reference, operations = filmed
    argv = [*argv, "--output", str(tmp_path / "killed")]
    interrupted(argv, seed=2, operations=operations)
    assert_same(reference, tmp_path / "killed")


def test_image_to_video_networks_get_members_of_the_first_frame(filmed, tmp_path):
    """What the VAE and CLIP make of the first frame of the clip, by the encoders themselves."""
    from PIL import Image

    from rcm_megatron.data.media import to_frames
    from rcm_megatron.data.scan import IMAGE_EMBED, IMAGE_LATENT
    from rcm_megatron.data.video import ClipReader
    from rcm_megatron.models.encoders import CLIPImageEncoder, WanVideoEncoder

    argv, *_ = filmed
    folder = Path(argv[1]).parent
    write_image_encoder(folder / "wan", image_dim=24)
    config = yaml.safe_load((folder / "run.yaml").read_text())
    config["model"] |= {"condition_channels": 20, "image_dim": 24}
    config["encoders"]["image"] = "clip"
    (folder / "i2v.yaml").write_text(yaml.safe_dump(config))
    run(
        1,
        [
            "videos",
            str(folder / "i2v.yaml"),
            *argv[2:],
            "--output",
            str(tmp_path / "i2v"),
            "--dtype",
            "fp32",
            "--full-text",
        ],
    )
    manifest = load_manifest(tmp_path / "i2v", on_error="raise")
    manifest.check_has(IMAGE_LATENT)
    manifest.check_has(IMAGE_EMBED)
    shape = {"latent_shape": (16, 2, 4, 6), "text_len": 12, "text_dim": 16}
    images = {"image_latent_shape": (16, 2, 4, 6), "image_embed_shape": (257, 24)}
    source = SampleSource(manifest, seed=0, on_error="raise", **shape, **images)
    sample = next(sample for sample in map(source.__getitem__, range(len(manifest))) if sample.row == 0)
    assert sample.embed_LD.shape == (12, 16), "--full-text keeps all positions"
    reader = ClipReader(frames=5, height=32, width=48, fps=16.0, device=torch.device("cpu"))
    video_CTHW = reader.read(folder / "clips" / "00.mp4")
    video_CTHW[:, 1:] = 0
    picture = Image.fromarray(to_frames(video_CTHW, scale=1)[0])
    latent_CTHW = WanVideoEncoder(folder / "wan" / "vae").encode(video_CTHW[None])[0]
    assert_close("image latent", latent_CTHW, torch.from_numpy(sample.image_latent_CTHW), rel=1e-5)
    embed_LD = CLIPImageEncoder(folder / "wan").encode([picture])[0]
    assert_close("image embedding", embed_LD, torch.from_numpy(sample.image_embed_LD), rel=1e-5)
    for command, changes, message in (
        (argv, ["encoders.image=none"], "got encoders.image=none"),
        (["teacher", "", "--prompts", str(folder / "prompts.txt")], [], "this teacher is given an image or frames"),
    ):
        (folder / "prompts.txt").write_text("a cat")
        command = [command[0], str(folder / "i2v.yaml"), *command[2:], "--output", str(tmp_path / "no"), *changes]
        ((status, stderr, *_),) = run_ranks(build, 1, command)
        assert status == 1 and message in stderr, stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--frames", "6"], "got 6 frames, need 4k+1; cut to 5 or give 9"),
        (["--size", "30x48"], "got height 30, need a multiple of 8; resize or crop to 24 or 32"),
        (["--frames", "9"], "got latents of (3, 4, 6) frames, rows and columns, need (2, 4, 6)"),
        (["--fps", "0"], "got --fps 0"),
        (["--on-error", "raise"], "02.mp4: cannot be read"),
        (["encoders.video=none"], "got encoders.video=none"),
        (["encoders.video=pixels"], "need 3 for videos in colour"),
        (["encoders.text=none", "data.negative_embedding=x.pt"], "got encoders.text=none"),
    ],
)
def test_bad_requests_for_videos_are_refused(filmed, tmp_path, changes, message):
    argv, *_ = filmed
    ((status, stderr, *_),) = run_ranks(build, 1, [*argv, "--output", str(tmp_path / "new"), *changes])
    assert status == 1 and message in stderr and "Traceback" not in stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", ["damaged", "uncaptioned", "links", "dot files"])
def test_the_first_videos_may_be_unusable(filmed, tmp_path, kind):
    """More of them than a probe would look at; the build leaves them out, by name."""
    argv, *_ = filmed
    clips, good = tmp_path / "clips", Path(argv[3])
    clips.mkdir()
    for number in range(11):
        path = clips / f"{'._' if kind == 'dot files' else 'a'}{number:02d}.mp4"
        if kind == "links":
            path.symlink_to(tmp_path / "away" / path.name)
        else:
            path.write_bytes(b"no video" if kind != "uncaptioned" else (good / "00.mp4").read_bytes())
        if kind != "uncaptioned":
            path.with_suffix(".txt").write_text("a cat")
    for ending in (".mp4", ".json"):
        (clips / f"b{ending}").write_bytes((good / f"00{ending}").read_bytes())
    run(1, [*argv[:3], str(clips), *argv[4:], "--output", str(tmp_path / "new")])
    assert len(load_manifest(tmp_path / "new", on_error="raise")) == 1
    assert len((tmp_path / "new" / "skipped.jsonl").read_text().splitlines()) == (0 if kind == "dot files" else 11)


def test_names_that_are_not_utf8_are_left_out_by_name(filmed, tmp_path):
    argv, *_ = filmed
    clips, good = tmp_path / "clips", Path(argv[3])
    clips.mkdir()
    for stem in (b"caf\xe9", b"b"):
        for ending in (".mp4", ".json"):
            Path(os.fsdecode(os.path.join(os.fsencode(clips), stem + ending.encode()))).write_bytes(
                (good / f"00{ending}").read_bytes()
            )
    run(1, [*argv[:3], str(clips), *argv[4:], "--output", str(tmp_path / "new")])
    assert (tmp_path / "new" / "videos.txt").read_text() == "b.mp4\ncaf\\xe9.mp4\n"
    assert "its name is not UTF-8" in (tmp_path / "new" / "skipped.jsonl").read_text()


@pytest.mark.parametrize(
    ("part", "message"),
    [("vae", "sample 0 ('baking cake'): latent"), ("text_encoder", ": embed")],
)
def test_encoders_that_are_not_finite_write_no_dataset(filmed, tmp_path, part, message):
    from safetensors.torch import load_file, save_file

    argv, *_ = filmed
    shutil.copytree(Path(argv[1]).parent / "wan", tmp_path / "wan")
    for weights in (tmp_path / "wan" / part).glob("*.safetensors"):
        tensors = load_file(weights)
        for name in tensors:
            if name.endswith(("quant_conv.bias", "final_layer_norm.weight")) and not name.startswith("post"):
                tensors[name][0] = float("nan")
        save_file(tensors, weights, metadata={"format": "pt"})
    changed = [*argv, "--output", str(tmp_path / "new"), f"encoders.folder={tmp_path / 'wan'}"]
    ((status, stderr, *_),) = run_ranks(build, 1, changed)
    assert status == 1 and message in stderr and "finite" in stderr and "Traceback" not in stderr, stderr
    assert not (tmp_path / "new").exists()


def test_latents_are_decoded_clamped_and_encoded_again(filmed, tmp_path):
    """Against diffusers' VAE and the same steps; captions and embeddings stay, on one rank and two."""
    argv, folder, _ = filmed
    again = ["latents", argv[1], "--data", str(folder), "--dtype", "fp32", "--samples-per-shard", "6"]
    run(1, [*again, "--output", str(tmp_path / "one")])
    run(2, [*again, "--output", str(tmp_path / "two")])
    assert_same(tmp_path / "one", tmp_path / "two")
    shape = {"latent_shape": (16, 2, 4, 6), "text_len": 12, "text_dim": 16}
    old, new = (
        SampleSource(load_manifest(path, on_error="raise"), seed=0, on_error="raise", **shape)
        for path in (folder, tmp_path / "one")
    )
    vae = AutoencoderKLWan.from_pretrained(Path(argv[1]).parent / "wan" / "vae")
    mean, std = (torch.tensor(vae.config[f"latents_{name}"]).view(1, -1, 1, 1, 1) for name in ("mean", "std"))
    assert len(new.manifest) == len(old.manifest) == 21
    changed = []
    for row in range(21):
        before, after = old.load(old.manifest.record(row)), new.load(new.manifest.record(row))
        assert after["prompt"] == before["prompt"] and (after["embed_LD"] == before["embed_LD"]).all()
        with torch.no_grad():
            pixels = vae.decode(torch.from_numpy(before["latent_CTHW"])[None] * std + mean).sample.clamp(-1, 1)
            expected = (vae.encode(pixels).latent_dist.mode() - mean) / std
        assert_close(f"latent {row}", expected[0], torch.from_numpy(after["latent_CTHW"]), rel=1e-4)
        changed.append(float(abs(after["latent_CTHW"] - before["latent_CTHW"]).max()))
    assert min(changed) > 0.01, "a random VAE does not give a latent back"
    assert (tmp_path / "one" / "negative_embed.pt").read_bytes() == (folder / "negative_embed.pt").read_bytes()


def test_what_cannot_be_encoded_again_is_refused(filmed, tmp_path):
    argv, folder, _ = filmed
    for data, changes, message in (
        (folder, ["encoders.video=none"], "got encoders.video=none"),
        (tmp_path, [], "holds no *.tar shard"),
        (folder, ["latent.height=8", "--on-error", "raise"], "key 000000000"),
    ):
        command = ["latents", argv[1], "--data", str(data), "--output", str(tmp_path / "new"), *changes]
        ((status, stderr, *_),) = run_ranks(build, 1, command)
        assert status == 1 and message in stderr and "Traceback" not in stderr, stderr
    assert not (tmp_path / "new").exists()


def test_a_folder_without_a_usable_video_is_refused_before_encoders_load(filmed, tmp_path):
    argv, *_ = filmed
    (tmp_path / "clips").mkdir()
    for content, message in ((None, "without a video"), ("no video", "none of the 1 videos")):
        if content:
            (tmp_path / "clips" / "a.mp4").write_text(content)
        changed = [*argv[:3], str(tmp_path / "clips"), *argv[4:], "--output", str(tmp_path / "new")]
        ((status, stderr, *_),) = run_ranks(build, 1, changed)
        assert status == 1 and message in stderr
