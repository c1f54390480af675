"""diffusers' WanPipeline around an exported student gives what `sample` gives: few steps by RCMScheduler, the teacher by its solvers.

Everything comes from files that the commands wrote: a trained student by `export`, samples by `sample`, encoders from one folder.
"""

import sys
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel

from rcm_megatron.config import load_config
from rcm_megatron.diffusion import samplers, trigflow
from rcm_megatron.diffusion.rcm_scheduler import RCMScheduler
from rcm_megatron.inference.pipelines import pipeline_usage
from rcm_megatron.models.encoders import WAN_NEGATIVE_PROMPT
from tests.distributed.harness import run_ranks
from tests.distributed.tiny_run import train
from tests.distributed.wan_run import LATENT, TEXT_LEN, write_wan_run
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

CONFIGS = Path(__file__).parents[2] / "model_configs"
PROMPTS = ("a cat and a dog", "Baking “cake”")
SIZE = {"height": 32, "width": 48, "num_frames": 5, "max_sequence_length": TEXT_LEN}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder of a run of two iterations: run.yaml, and the student in `student/`."""
    folder = tmp_path_factory.mktemp("pipeline")
    config = write_wan_run(folder)
    run_ranks(train, 1, str(config), ["trainer.stop_after=2"])
    run_command(["export", str(config), "--weights", "student", "--output", str(folder / "student")])
    return folder


def sampled(trained, tmp_path, weights, steps, *overrides):
    """Latents [B, C, T, H, W] and videos that `sample` makes for PROMPTS."""
    return sample_files(trained, tmp_path, [*prompts(), "--weights", weights, "--steps", str(steps)], *overrides)


def prompts():
    return [part for prompt in PROMPTS for part in ("--prompt", prompt)]


def pipeline_of(trained, network, scheduler):
    return wan_pipeline(WanPipeline, trained, trained / network, scheduler)


def noise_of(trained):
    seed = load_config(trained / "run.yaml").sampling.seed
    return SamplersNoise(tuple(LATENT.values()), samples=len(PROMPTS), seed=seed)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_students_samples(trained, tmp_path, steps):
    """To the decoded video, with the noise of `sample`."""
    latents, videos = sampled(trained, tmp_path, "student", steps)
    scheduler, noise = scheduler_of_export(trained / "student"), noise_of(trained)
    pipeline = pipeline_of(trained, "student", scheduler)

    def call(output_type):
        given = {"latents": scheduler.init_noise_sigma * noise.first, "callback_on_step_end": noise.into(scheduler)}
        options = {"num_inference_steps": steps, "guidance_scale": 1.0, "output_type": output_type}
        return pipeline(list(PROMPTS), **given, **options, **SIZE).frames

    assert_close("latents", latents, call("latent"), rel=1e-5)
    assert_close("videos", videos, call("pt").transpose(1, 2) * 2 - 1, rel=1e-5)


def test_noise_of_one_generator(trained):
    """A user's own way: one generator for the first noise, by the pipeline, and for the rest; pure noise at the start."""

    transformer = WanTransformer3DModel.from_pretrained(trained / "student").eval()
    scheduler = RCMScheduler(sigma_max=None)
    pipeline = pipeline_of(trained, "student", scheduler)
    with torch.no_grad():
        text, _ = pipeline.encode_prompt(list(PROMPTS), None, False, max_sequence_length=TEXT_LEN)

    def made(seed):
        scheduler.generator = generator = torch.Generator().manual_seed(seed)
        options = {"num_inference_steps": 3, "guidance_scale": 1.0, "output_type": "latent"}
        return pipeline(list(PROMPTS), generator=generator, **options, **SIZE).frames

    def denoise(xt, t):
        x, timestep = (value.float() for value in trigflow.precondition(xt, t))
        (v,) = transformer(x, timestep.expand(len(x)), text, return_dict=False)
        return trigflow.denoised(xt, v, t)

    generator = torch.Generator().manual_seed(4)
    noise = [torch.randn(len(PROMPTS), *LATENT.values(), generator=generator) for _ in range(3)]
    expected = samplers.student_sample(denoise, noise[0], steps=3, fresh_noise=lambda j: noise[j + 1])
    assert_close("latents", expected, made(4), rel=1e-5)
    assert torch.equal(made(4), made(4))
    assert not torch.allclose(made(4), made(5))


@pytest.mark.parametrize("method", SOLVERS)
def test_a_teachers_samples(trained, tmp_path, method):
    """With guidance and the release's negative prompt, by diffusers' solvers."""
    steps = 4
    overrides = [f"sampling.teacher_sampler={method}", f"sampling.teacher_shift={SHIFT}", "sampling.guidance=3"]
    latents, videos = sampled(trained, tmp_path, "teacher", steps, *overrides)
    pipeline = pipeline_of(trained, "teacher", on_our_grid(SOLVERS[method](), steps))
    first, negative = noise_of(trained).first, [WAN_NEGATIVE_PROMPT] * len(PROMPTS)

    def call(output_type):
        options = {"num_inference_steps": steps, "guidance_scale": 3.0, "output_type": output_type}
        return pipeline(list(PROMPTS), negative, latents=first, **options, **SIZE).frames

    assert_close("latents", latents, call("latent"), rel=1e-5)
    assert_close("videos", videos, call("pt").transpose(1, 2) * 2 - 1, rel=1e-5)


def test_the_scheduler_refuses_what_it_cannot_do():
    scheduler = RCMScheduler()
    for steps in (0, 5, None):
        with pytest.raises(ValueError, match="need 1 to 4; mid_times="):
            scheduler.set_timesteps(steps)
    scheduler.set_timesteps(1)
    x = torch.zeros(1, 2)
    assert scheduler.step(x, scheduler.timesteps[0], x).prev_sample.dtype == x.dtype
    with pytest.raises(ValueError, match="got step 2 of 1; call set_timesteps"):
        scheduler.step(x, scheduler.timesteps[0], x)
    with pytest.raises(ValueError, match="need 'flow' .Wan. or 'edm'"):
        RCMScheduler(space="ddpm")
    with pytest.raises(ValueError, match="need a number"):
        RCMScheduler(space="edm", sigma_max=None)


def test_the_listing_of_the_model_card_runs(trained, monkeypatch):
    """As it stands, but for the other components, which it would download."""
    listing = (trained / "student" / "README.md").read_text().split("```python\n")[1].split("```")[0]

    def components(base, transformer, torch_dtype):
        assert base.startswith("Wan-AI/") and torch_dtype == transformer.dtype == torch.bfloat16
        pipeline = pipeline_of(trained, "student", RCMScheduler())
        pipeline.register_modules(transformer=transformer)
        return pipeline

    monkeypatch.setattr(WanPipeline, "from_pretrained", components)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.delitem(sys.modules, "rcm_scheduler", raising=False)
    names = {}
    exec(compile(listing, "README.md", "exec"), names)
    assert names["output"].frames.shape == (1, 5, 32, 48, 3)
    assert type(names["scheduler"]).__module__ == "rcm_scheduler"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_listing_of_every_network_names_its_pipeline(path):
    run = load_config(path)
    listing = pipeline_usage(run, "folder")
    compile(listing, "README.md", "exec")
    name = listing.split("pipeline = ")[1].split(".")[0]
    assert hasattr(diffusers, name) and f"{name}, " in listing
    kinds = {"t2v": "WanPipeline", "ti2v": "WanImageToVideoPipeline", "i2v": "WanImageToVideoPipeline"}
    kinds |= {"text2image": "Cosmos2TextToImagePipeline", "video2world": "Cosmos2VideoToWorldPipeline"}
    assert name == next((kind for part, kind in kinds.items() if part in path.stem), "WanPipeline")
    assert ("image=image" in listing) == (name in ("WanImageToVideoPipeline", "Cosmos2VideoToWorldPipeline"))
    assert ("fps=24" in listing) == (name == "Cosmos2VideoToWorldPipeline"), "its networks know no frame rate"


def test_a_saved_pipeline_loads_as_the_card_says(trained, tmp_path, monkeypatch):
    """Twice over, without rcm_megatron and without the exported folder: the same videos, bit for bit once it is in bf16."""
    card = (trained / "student" / "README.md").read_text()
    pipeline = pipeline_of(trained, "student", scheduler_of_export(trained / "student"))
    settings = ("mid_times", "sigma_max", "space", "num_train_timesteps")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "rcm_scheduler", raising=False)

    def made(pipeline):
        pipeline.set_progress_bar_config(disable=True)
        pipeline.scheduler.generator = generator = torch.Generator().manual_seed(4)
        first = pipeline.scheduler.init_noise_sigma * torch.randn(1, *LATENT.values(), generator=generator)
        options = {"num_inference_steps": 3, "guidance_scale": 1.0, "output_type": "latent"}
        return pipeline(PROMPTS[0], latents=first, **options, **SIZE).frames

    names = {"pipeline": pipeline, "torch": torch, "WanPipeline": WanPipeline}
    videos = [made(pipeline)]
    for _ in range(2):
        exec(compile(card.split("```python\n")[2].split("```")[0], "README.md", "exec"), names)
        loaded = names["pipeline"].scheduler.config
        assert {name: loaded[name] for name in settings} == {name: pipeline.scheduler.config[name] for name in settings}
        videos.append(made(names["pipeline"]).float())
    assert_close("loaded in bf16", videos[0], videos[1], rel=5e-2)
    assert torch.equal(videos[1], videos[2])
    assert (tmp_path / "pipeline" / "scheduler" / "rcm_scheduler.py").is_file()
    assert "rcm_scheduler" not in sys.modules
