"""What the comparisons with diffusers' pipelines share: commands, tiny pipelines, and the noise and times of our samplers in theirs."""

import importlib.util
import sys
from functools import partial

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanTransformer3DModel
from safetensors.torch import load_file

from rcm_megatron.diffusion.noise import SeededDraws
from rcm_megatron.models.encoders import WanVideoEncoder
from tests.distributed.harness import run_ranks
from tests.distributed.tiny_run import command


def run_command(argv, *overrides):
    """A command on one rank."""
    ((status, stderr),) = run_ranks(command, 1, [*argv, *overrides])
    assert status == 0, stderr


def sample_files(folder, output, argv, *overrides):
    """Latents [B, C, T, H, W] and videos that `sample` makes with the run of `folder`."""
    run_command(["sample", str(folder / "run.yaml"), "--output", str(output), *argv], *overrides)
    latents = torch.stack([load_file(path)["latent"] for path in sorted(output.glob("*.safetensors"))])
    return latents, WanVideoEncoder(folder / "wan" / "vae").decode(latents)


def wan_pipeline(cls, folder, network, scheduler, **options):
    """`cls` of the encoders of a run (tests.distributed.wan_run) and the transformer in the folder `network`."""
    from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

    pipeline = cls(
        tokenizer=PreTrainedTokenizerFast.from_pretrained(folder / "wan" / "tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(folder / "wan" / "text_encoder").eval(),
        vae=AutoencoderKLWan.from_pretrained(folder / "wan" / "vae").eval(),
        scheduler=scheduler,
        transformer=WanTransformer3DModel.from_pretrained(network).eval(),
        **options,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def scheduler_of_export(folder):
    """RCMScheduler from the exported folder alone: its copy of the class, its configuration."""
    spec = importlib.util.spec_from_file_location("rcm_scheduler_of_export", folder / "rcm_scheduler.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.RCMScheduler.from_pretrained(folder)


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


class SamplersNoise:
    """The noise of `Sampler` for samples 0, 1, ...: of (seed, sample index) and a purpose."""

    def __init__(self, shape, *, samples, seed=0):
        self.draws, self.shape = SeededDraws(seed, 0, range(samples)), shape

    @property
    def first(self):
        return self.draws.normal("sample_noise", self.shape)

    def into(self, scheduler):
        """`callback_on_step_end` of a pipeline's call, so that RCMScheduler re-noises as `Sampler` does."""

        def give(step):
            purpose = f"sample_renoise/{step}"
            scheduler.generator = [self.draws._generator(purpose, index) for index in self.draws.sample_indices]

        def after_step(pipeline, step, timestep, tensors):
            give(step + 1)
            return tensors

        give(0)
        return after_step
