"""diffusers' WanPipeline around an exported student gives what `sample` gives: few steps by RCMScheduler, the teacher by its solvers.

Everything comes from files that the commands wrote: a trained student by `export`, samples by `sample`, encoders from one folder.
"""

import importlib.util
import sys
from functools import partial

import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from safetensors.torch import load_file

from rcm_megatron.config import load_config
from rcm_megatron.diffusion import samplers, trigflow
from rcm_megatron.diffusion.rcm_scheduler import RCMScheduler
from rcm_megatron.models.encoders import WAN_NEGATIVE_PROMPT, WanVideoEncoder
from tests.distributed.harness import run_ranks
from tests.distributed.tiny_run import command, train
from tests.distributed.wan_run import LATENT, TEXT_LEN, write_wan_run
from tests.helpers import assert_close
from tests.interop.pipelines import SamplersNoise

PROMPTS = ("a cat and a dog", "Baking “cake”")
SIZE = {"height": 32, "width": 48, "num_frames": 5, "max_sequence_length": TEXT_LEN}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder of a run of two iterations: run.yaml, and the student in `student/`."""
    folder = tmp_path_factory.mktemp("pipeline")
    config = write_wan_run(folder)
    run_ranks(train, 1, str(config), ["trainer.stop_after=2"])
    run(["export", str(config), "--weights", "student", "--output", str(folder / "student")])
    return folder


def run(argv, *overrides):
    """A command on one rank."""
    ((status, stderr),) = run_ranks(command, 1, [*argv, *overrides])
    assert status == 0, stderr


def sampled(trained, tmp_path, weights, steps, *overrides):
    """Latents [B, C, T, H, W] and videos that `sample` makes for PROMPTS."""

    argv = ["sample", str(trained / "run.yaml"), "--weights", weights, "--steps", str(steps), "--output", str(tmp_path)]
    run([*argv, *(part for prompt in PROMPTS for part in ("--prompt", prompt))], *overrides)
    latents = torch.stack([load_file(path)["latent"] for path in sorted(tmp_path.glob("*.safetensors"))])
    return latents, WanVideoEncoder(trained / "wan" / "vae").decode(latents)


def pipeline_of(trained, network, scheduler):
    from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

    pipeline = WanPipeline(
        tokenizer=PreTrainedTokenizerFast.from_pretrained(trained / "wan" / "tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(trained / "wan" / "text_encoder").eval(),
        vae=AutoencoderKLWan.from_pretrained(trained / "wan" / "vae").eval(),
        scheduler=scheduler,
        transformer=WanTransformer3DModel.from_pretrained(trained / network).eval(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise_of(trained):
    seed = load_config(trained / "run.yaml").sampling.seed
    return SamplersNoise(tuple(LATENT.values()), samples=len(PROMPTS), seed=seed)


def scheduler_of_export(folder):
    """RCMScheduler from the exported folder alone: its copy of the class, its configuration."""
    spec = importlib.util.spec_from_file_location("rcm_scheduler_of_export", folder / "rcm_scheduler.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.RCMScheduler.from_pretrained(folder)


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


SHIFT = 3.0
SOLVERS = {
    "euler": partial(FlowMatchEulerDiscreteScheduler, shift=SHIFT),
    "unipc": partial(
        UniPCMultistepScheduler, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT
    ),
}


def on_our_grid(scheduler, steps):
    """The scheduler on times that fall evenly to 0 before the shift; UniPC's are cut to integers for the network, here they are exact."""
    grid, set_timesteps = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)[:-1].numpy(), scheduler.set_timesteps

    def replacement(num_inference_steps, device):
        set_timesteps(num_inference_steps, device=device, sigmas=grid)
        scheduler.timesteps = 1000 * scheduler.sigmas[:-1]

    scheduler.set_timesteps = replacement
    return scheduler


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
