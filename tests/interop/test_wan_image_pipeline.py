"""diffusers' WanImageToVideoPipeline around exported networks gives what `sample --image` gives, with CLIP, without, and for TI2V."""

import pytest
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image
from safetensors.torch import save_file

from rcm_megatron.config import load_config
from rcm_megatron.models.encoders import (
    WAN_NEGATIVE_PROMPT,
    CLIPImageEncoder,
    WanVideoEncoder,
    image_latent,
    image_pixels,
)
from tests.distributed.harness import run_ranks
from tests.distributed.tiny_run import train
from tests.distributed.wan_run import LATENT, write_wan_run
from tests.helpers import assert_close
from tests.interop.pipelines import (
    SHIFT,
    SOLVERS,
    SamplersNoise,
    on_our_grid,
    run_command,
    sample_files,
    scheduler_of_export,
    wan_pipeline,
)

PROMPTS = ["a cat and a dog", "a cake"]
STUDENT = ("--weights", "student", "--steps", "2")
SIZE = {"height": 32, "width": 48, "num_frames": 5}


def write_picture(path, *, seed):
    """A smooth RGB picture of a size of its own."""
    pixels = torch.rand(5, 6, 3, generator=torch.Generator().manual_seed(seed)).mul(255).byte()
    Image.fromarray(pixels.numpy()).resize((71, 50), Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture(scope="module", params=["i2v", "ti2v"])
def trained(request, tmp_path_factory):
    """Folder of a run of two iterations: run.yaml, the student in `student/`, and a picture."""
    folder = tmp_path_factory.mktemp(request.param)
    config = write_wan_run(folder, request.param)
    run_ranks(train, 1, str(config), ["trainer.stop_after=2"])
    run_command(["export", str(config), "--weights", "student", "--output", str(folder / "student")])
    write_picture(folder / "picture.png", seed=0)
    return folder


def sampled(folder, output, *argv, overrides=()):
    prompts = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    return sample_files(folder, output, [*argv, *prompts, "--image", str(folder / "picture.png")], *overrides)


def pipeline_of(folder, network, scheduler):
    from transformers import CLIPImageProcessorPil, CLIPVisionModel

    options = {"expand_timesteps": is_ti2v(folder)}
    if (folder / "wan" / "image_encoder").exists():
        options["image_encoder"] = CLIPVisionModel.from_pretrained(folder / "wan" / "image_encoder").eval()
        options["image_processor"] = CLIPImageProcessorPil.from_pretrained(folder / "wan" / "image_processor")
    return wan_pipeline(WanImageToVideoPipeline, folder, folder / network, scheduler, **options)


def is_ti2v(folder):
    return folder.name.startswith("ti2v")


def size_of(folder):
    """Of the pipeline's call."""
    return SIZE | {"max_sequence_length": load_config(folder / "run.yaml").model.text_len}


def noise():
    return SamplersNoise(tuple(LATENT.values()), samples=len(PROMPTS))


@pytest.fixture(scope="module")
def students(trained, tmp_path_factory):
    """Latents and videos of two steps of the student."""
    return sampled(trained, tmp_path_factory.mktemp("students"), *STUDENT)


def test_a_students_samples(trained, students):
    latents, videos = students
    scheduler, drawn = scheduler_of_export(trained / "student"), noise()
    pipeline = pipeline_of(trained, "student", scheduler)

    def call(output_type):
        given = {"latents": scheduler.init_noise_sigma * drawn.first, "callback_on_step_end": drawn.into(scheduler)}
        options = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": output_type} | size_of(trained)
        return pipeline(Image.open(trained / "picture.png"), PROMPTS, **given, **options).frames

    assert_close("latents", latents, call("latent"), rel=1e-5)
    assert_close("videos", videos, call("pt").transpose(1, 2) * 2 - 1, rel=1e-5)


def check_teacher(folder, output):
    """With guidance, whose two branches see the same image."""
    overrides = ["sampling.teacher_sampler=euler", f"sampling.teacher_shift={SHIFT}", "sampling.guidance=3"]
    latents, _ = sampled(folder, output, "--weights", "teacher", "--steps", "3", overrides=overrides)
    pipeline = pipeline_of(folder, "teacher", on_our_grid(SOLVERS["euler"](), 3))
    options = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "latent", "latents": noise().first}
    options |= size_of(folder)
    negative = [WAN_NEGATIVE_PROMPT] * len(PROMPTS)
    frames = pipeline(Image.open(folder / "picture.png"), PROMPTS, negative, **options).frames
    assert_close("latents", latents, frames, rel=1e-5)


def test_a_teachers_samples(trained, tmp_path):
    if is_ti2v(trained):
        pytest.skip("given frames with guidance are those of tests/interop/test_cosmos_pipeline.py")
    check_teacher(trained, tmp_path)


def test_wan22_without_clip(tmp_path):
    write_wan_run(tmp_path, "i2v_2.2")
    write_picture(tmp_path / "picture.png", seed=0)
    check_teacher(tmp_path, tmp_path / "samples")


def test_what_the_encoders_make_of_a_picture_may_come_as_files_and_counts(trained, students, tmp_path):
    expected = students[0][:1]
    write_picture(trained / "other.png", seed=1)
    encoder = WanVideoEncoder(trained / "wan" / "vae")

    def sample_from_files(name, picture, embedded):
        """The first sample, with the latent of one picture and CLIP's features of another."""
        frames = 1 if is_ti2v(trained) else LATENT["frames"]
        pixels = image_pixels(Image.open(trained / picture), height=SIZE["height"], width=SIZE["width"])
        tensors = {
            "conditional-latent" if is_ti2v(trained) else "image-latent": image_latent(encoder, pixels, frames=frames)
        }
        if not is_ti2v(trained):
            tensors["image-embed"] = CLIPImageEncoder(trained / "wan").encode([Image.open(trained / embedded)])[0]
        options = [*STUDENT, "--prompt", PROMPTS[0]]
        for option, tensor in tensors.items():
            save_file({"x": tensor}, tmp_path / f"{option}.safetensors")
            options += [f"--{option}", str(tmp_path / f"{option}.safetensors")]
        return sample_files(trained, tmp_path / name, options)[0]

    assert_close("as --image", expected, sample_from_files("same", "picture.png", "picture.png"), rel=1e-6)
    latent = sample_from_files("latent", "other.png", "picture.png")
    assert (latent - expected).norm() / expected.norm() > 1e-3
    if not is_ti2v(trained):
        embed = sample_from_files("embed", "picture.png", "other.png")
        assert (embed - expected).norm() / expected.norm() > 1e-4
