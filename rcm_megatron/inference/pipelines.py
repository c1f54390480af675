"""What an exported student needs to be sampled by diffusers' pipelines: the scheduler's files, and how to use them."""

from __future__ import annotations

import json
from importlib.resources import files

from rcm_megatron.config import RunConfig
from rcm_megatron.config.roles import low_noise_of
from rcm_megatron.registries import family_of

SCHEDULER_FILE = "rcm_scheduler.py"
_LISTING = """\
import sys

import diffusers
import torch
from diffusers import {names}

folder = {folder!r}
sys.path.append(folder)
from rcm_scheduler import RCMScheduler  # its file needs torch and diffusers alone

{networks}
pipeline = {pipeline}.from_pretrained({base!r}, {given}, torch_dtype=torch.bfloat16)
pipeline.scheduler = scheduler = RCMScheduler.from_pretrained(folder)
scheduler.generator = noise = torch.Generator().manual_seed(0)
{prepare}
output = pipeline({call})
"""


_SAVING = """\
pipeline.save_pretrained("pipeline")
pipeline = {pipeline}.from_pretrained("pipeline", trust_remote_code=True, torch_dtype=torch.bfloat16)
"""


def student_companions(run: RunConfig, folder: str) -> tuple[str, dict[str, str]]:
    """How to sample the student of `folder`, for its model card, and the files that this takes beside the weights."""
    times = ", ".join(str(time) for time in run.sampling.student_times)
    saving = _SAVING.format(pipeline=family_of(run.model).pipeline(run).pipeline)
    usage = (
        f"A few-step generator distilled with rCM: start at TrigFlow time atan({run.sampling.sigma_max:g}), denoise, re-noise to the "
        f"next of {times}, 1 to {len(run.sampling.student_times) + 1} network evaluations, no guidance. With diffusers' pipelines:\n\n"
        f"```python\n{pipeline_usage(run, folder)}```\n\nThe whole pipeline saves and loads like any other, with the "
        f"scheduler's class, which is code that you trust:\n\n```python\n{saving}```"
    )
    return usage, scheduler_files(run)


def scheduler_files(run: RunConfig) -> dict[str, str]:
    """Files that belong beside the student's weights: the scheduler's class, and its configuration for this run."""
    sampling, space = run.sampling, family_of(run.model).scheduler_space
    config = {"_class_name": "RCMScheduler", "space": space, "num_train_timesteps": 1000}
    config |= {"mid_times": list(sampling.student_times), "sigma_max": sampling.sigma_max}
    source = files("rcm_megatron.diffusion").joinpath(SCHEDULER_FILE).read_text()
    return {SCHEDULER_FILE: source, "scheduler_config.json": json.dumps(config, indent=2) + "\n"}


def pipeline_usage(run: RunConfig, folder: str) -> str:
    """Python that samples the student of `folder` with diffusers."""
    family = family_of(run.model)
    how, prepare = family.pipeline(run), []
    call = ['prompt="a cat on a sofa"', *how.arguments]
    call += [f"num_inference_steps={max(run.sampling.student_steps)}", "guidance_scale=1.0", "generator=noise"]
    if not how.makes_noise:
        shape = ", ".join(map(str, run.latent.shape_CTHW))
        prepare.append(f"latents = scheduler.init_noise_sigma * torch.randn(1, {shape}, generator=noise)")
        call.append("latents=latents")
    if how.takes_image:
        prepare.append('image = diffusers.utils.load_image("first_frame.png")')
        call.insert(0, "image=image")
    networks, given = {"transformer": "folder"}, {"transformer": "transformer"}
    if low_noise_of("student") in run.networks:
        folder, networks["transformer_2"] = f"{folder}/transformer", 'f"{folder}_2"'
        given |= {"transformer_2": "transformer_2", "boundary_ratio": f"{run.distillation.expert_boundary:g}"}
    load = f"{family.diffusers_class}.from_pretrained({{}}, torch_dtype=torch.bfloat16)"
    return _LISTING.format(
        names=f"{how.pipeline}, {family.diffusers_class}",
        pipeline=how.pipeline,
        networks="\n".join(f"{name} = {load.format(where)}" for name, where in networks.items()),
        given=", ".join(f"{name}={value}" for name, value in given.items()),
        folder=folder,
        base=how.base,
        prepare="\n".join(prepare),
        call=", ".join(call),
    )
