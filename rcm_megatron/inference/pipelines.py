"""What an exported student needs to be sampled by diffusers' pipelines: the scheduler's files, and how to use them."""

from __future__ import annotations

import json
from importlib.resources import files

from rcm_megatron.config import RunConfig
from rcm_megatron.models.cosmos import ROPE_FPS

SCHEDULER_FILE = "rcm_scheduler.py"
_PIPELINES = {
    "t2v": ("WanPipeline", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
    "i2v": ("WanImageToVideoPipeline", "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"),
    "ti2v": ("WanImageToVideoPipeline", "Wan-AI/Wan2.2-TI2V-5B-Diffusers"),
    "t2i": ("Cosmos2TextToImagePipeline", "nvidia/Cosmos-Predict2-2B-Text2Image"),
    "v2w": ("Cosmos2VideoToWorldPipeline", "nvidia/Cosmos-Predict2-2B-Video2World"),
}
"""diffusers' class, and a checkpoint with the other components, by what a network makes of what."""


_LISTING = """\
import sys

import diffusers
import torch
from diffusers import {names}

folder = {folder!r}
sys.path.append(folder)
from rcm_scheduler import RCMScheduler  # its file needs torch and diffusers alone

transformer = {transformer}.from_pretrained(folder, torch_dtype=torch.bfloat16)
pipeline = {pipeline}.from_pretrained({base!r}, transformer=transformer, torch_dtype=torch.bfloat16)
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
    usage = (
        f"A few-step generator distilled with rCM: start at TrigFlow time atan({run.sampling.sigma_max:g}), denoise, re-noise to the "
        f"next of {times}, 1 to {len(run.sampling.student_times) + 1} network evaluations, no guidance. With diffusers' pipelines:\n\n"
        f"```python\n{pipeline_usage(run, folder)}```\n\nThe whole pipeline saves and loads like any other, with the "
        f"scheduler's class, which is code that you trust:\n\n```python\n{_SAVING.format(pipeline=_PIPELINES[_kind(run)][0])}```"
    )
    return usage, scheduler_files(run)


def scheduler_files(run: RunConfig) -> dict[str, str]:
    """Files that belong beside the student's weights: the scheduler's class, and its configuration for this run."""
    space = "edm" if run.model.family == "cosmos" else "flow"
    sampling = run.sampling
    config = {"_class_name": "RCMScheduler", "space": space, "num_train_timesteps": 1000}
    config |= {"mid_times": list(sampling.student_times), "sigma_max": sampling.sigma_max}
    source = files("rcm_megatron.diffusion").joinpath(SCHEDULER_FILE).read_text()
    return {SCHEDULER_FILE: source, "scheduler_config.json": json.dumps(config, indent=2) + "\n"}


def pipeline_usage(run: RunConfig, folder: str) -> str:
    """Python that samples the student of `folder` with diffusers."""
    kind = _kind(run)
    pipeline, base = _PIPELINES[kind]
    transformer = "CosmosTransformer3DModel" if run.model.family == "cosmos" else "WanTransformer3DModel"
    names, prepare, call = f"{pipeline}, {transformer}", [], ['prompt="a cat on a sofa"', *_size(run, kind)]
    call += [f"num_inference_steps={max(run.sampling.student_steps)}", "guidance_scale=1.0", "generator=noise"]
    if run.model.family == "wan":  # the Cosmos2 pipelines scale their noise themselves
        shape = ", ".join(map(str, run.latent.shape_CTHW))
        prepare.append(f"latents = scheduler.init_noise_sigma * torch.randn(1, {shape}, generator=noise)")
        call.append("latents=latents")
    if kind in ("i2v", "ti2v", "v2w"):
        prepare.append('image = diffusers.utils.load_image("first_frame.png")')
        call.insert(0, "image=image")
    if kind == "v2w":  # the pipeline's own 16 would stretch time as the network was not trained
        call.append(f"fps={run.model.cosmos.rope_fps or ROPE_FPS:g}")
    return _LISTING.format(
        names=names,
        pipeline=pipeline,
        transformer=transformer,
        folder=folder,
        base=base,
        prepare="\n".join(prepare),
        call=", ".join(call),
    )


def _size(run: RunConfig, kind: str) -> list[str]:
    """The arguments of a pipeline's call that make latents of the run's shape, by the factors of Wan2.1's VAE or Wan2.2's."""
    channels, frames, height, width = run.latent.shape_CTHW
    factor = 16 if channels == 48 else 8
    size = [f"height={factor * height}", f"width={factor * width}"]
    return size if kind == "t2i" else [*size, f"num_frames={4 * (frames - 1) + 1}"]


def _kind(run: RunConfig) -> str:
    model = run.model
    if model.family == "cosmos":
        return "v2w" if model.conditional_frames else "t2i"
    if model.conditional_frames:
        return "ti2v"
    return "i2v" if model.wan is not None and model.wan.condition_channels else "t2v"
