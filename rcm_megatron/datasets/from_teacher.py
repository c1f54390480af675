"""A dataset of a teacher's samples, by the recipe of rCM's published one: 100 Euler steps, shift 3, guidance 5, a seed a sample.

Shapes: B batch, C channels, T latent frames, H, W, L text positions, D text width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from rcm_megatron.config import RunConfig
from rcm_megatron.data.captions import read_prompts
from rcm_megatron.data.samples import load_caption_embedding
from rcm_megatron.datasets.build import DatasetBuild, Unit, wait_for
from rcm_megatron.datasets.ranks import (
    Made,
    built_sample,
    checksums,
    encode_texts,
    make_units,
    open_build,
    report,
    text_facts,
)
from rcm_megatron.errors import InputError
from rcm_megatron.inference.conditioning import image_shapes
from rcm_megatron.inference.encoding import check_encoders
from rcm_megatron.inference.networks import init_parallel, load_network, low_noise_expert
from rcm_megatron.inference.sampler import LowNoiseExpert, Sampler
from rcm_megatron.platform.device import this_device
from rcm_megatron.requests import TeacherRequest


def build_from_teacher(run: RunConfig, request: TeacherRequest) -> None:
    """Sample the teacher for every prompt; any layout, data-parallel replicas share the units. InputError for what cannot be met."""
    prompts = [prompt for prompt in read_prompts(request.prompts) for _ in range(request.samples_per_prompt)]
    _check(run, request)
    groups = init_parallel(run)
    build, left = open_build(
        run,
        request,
        num_samples=len(prompts),
        unit_size=request.batch_size or run.trainer.micro_batch_size,
        recipe=lambda: _recipe(run, request, prompts),
    )
    if left:
        encode_texts(run, build, left, lambda unit: [prompts[index] for index in unit.indices])
        network, low_noise = load_network(run, groups, weights="teacher"), low_noise_expert(run, groups, "teacher")
        mine = left[groups.dp_rank :: groups.dp_size]
        null_L1D = _negative(run, build) if mine else None  # a rank without work may come after the end

        def make(unit: Unit) -> Made:
            text_len, embed_BLD = run.model.text_len, build.text(unit)
            latents_BCTHW = _sample(request, network, low_noise, unit, _padded(embed_BLD, text_len), null_L1D)
            return [
                built_sample(request, index, latent_CTHW, embed_LD, prompts[index], text_len=text_len)
                for index, latent_CTHW, embed_LD in zip(unit.indices, latents_BCTHW, embed_BLD, strict=True)
            ], {}

        make_units(build, mine, make, writes=groups.token_shard == 0 and groups.pp_rank == 0)
    report(build)


@torch.no_grad()
def _sample(
    request: TeacherRequest,
    network: list,
    low_noise: LowNoiseExpert | None,
    unit: Unit,
    text_BLD: Tensor,
    null_L1D: Tensor,
) -> Tensor:
    device, layout = this_device(), network[0].layout
    null_LBD = null_L1D.to(device).expand(-1, len(unit.indices), -1)
    text_LBD = text_BLD.transpose(0, 1).to(device)
    sampler = Sampler(network, layout, text_LBD, null_LBD, request.seed, list(unit.indices), low_noise=low_noise)
    return sampler.teacher(steps=request.steps, guidance=request.guidance, shift=request.shift, method="euler")


def _check(run: RunConfig, request: TeacherRequest) -> None:
    check_encoders(run)
    if run.encoders.text == "none":
        raise InputError("got encoders.text=none, need a text encoder for the prompts; set it to umt5 or t5")
    if "teacher" not in run.networks or run.networks["teacher"].init is None:
        raise InputError("got networks.teacher.init=null, need a teacher to sample; set it to a checkpoint")
    given = run.distillation.conditional_frames
    if (given is not None and 0 not in given) or any(image_shapes(run).values()):
        raise InputError("this teacher is given an image or frames, and prompts have none; use the `videos` command")
    if request.steps < 1 or request.samples_per_prompt < 1 or request.shift <= 0:
        raise InputError(
            f"got --steps {request.steps}, --samples-per-prompt {request.samples_per_prompt}, --shift {request.shift}; "
            "need at least 1, at least 1, and more than 0"
        )


def _recipe(run: RunConfig, request: TeacherRequest, prompts: Sequence[str]) -> dict[str, object]:
    teacher = Path(run.networks["teacher"].init)
    inner = teacher / "transformer"
    return {
        "source": "teacher",
        **{name: getattr(request, name) for name in ("seed", "steps", "shift", "guidance", "samples_per_prompt")},
        "sampler": "euler",
        "prompts": text_facts(prompts),
        "teacher": str(teacher),
        "teacher_sha256": checksums(inner if inner.is_dir() else teacher),
        "parallel": dataclasses.asdict(run.parallel),
        "precision": dataclasses.asdict(run.precision),
    }


def _negative(run: RunConfig, build: DatasetBuild) -> Tensor:
    path = wait_for(build.negative)
    return load_caption_embedding(path, text_len=run.model.text_len, text_dim=run.model.text_dim)[:, None]


def _padded(embed_BLD: Tensor, text_len: int) -> Tensor:
    return functional.pad(embed_BLD.float(), (0, 0, 0, text_len - embed_BLD.shape[1]))
