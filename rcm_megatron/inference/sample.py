"""`python -m rcm_megatron sample`: videos of a run's networks as MP4 files and latents.

Networks that the run trains take the student's few steps, the others the teacher's solver and guidance.
"""

from __future__ import annotations

import re
import time
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from rcm_megatron.config import RunConfig
from rcm_megatron.data.captions import read_prompts
from rcm_megatron.data.media import to_frames, write_mp4
from rcm_megatron.data.samples import load_caption_embedding
from rcm_megatron.diffusion.trigflow import needs_guidance
from rcm_megatron.errors import InputError
from rcm_megatron.files import save_safetensors
from rcm_megatron.finite import require_finite
from rcm_megatron.inference.conditioning import check_conditioning, load_conditioning
from rcm_megatron.inference.encoding import check_encoders, encode_captions, load_null_text, video_encoder
from rcm_megatron.inference.networks import (
    SampleBatches,
    init_parallel,
    is_trained,
    load_network,
    low_noise_expert,
    resolve_checkpoint,
    student_sampling,
    teacher_sampling,
)
from rcm_megatron.inference.sampler import teacher_evaluations
from rcm_megatron.models.encoders import VideoEncoder
from rcm_megatron.requests import SampleRequest


def sample(run: RunConfig, request: SampleRequest) -> None:
    """Write `<number>_<caption>.mp4` (where the run has a video encoder) and `.safetensors` for each sample.

    Any layout. Raises InputError for prompts that cannot be encoded, or step counts that the sampler does not have.
    Text and image encoders are freed before the network is loaded; ranks that write videos hold a video encoder beside it.
    """
    teacher = not is_trained(run, request.weights)
    request = _completed(run, request, teacher=teacher)
    _check(run, request)
    groups = init_parallel(run)
    checkpoint = None if teacher else resolve_checkpoint(run, request.checkpoint)
    names, text_LBD, null_text_L1D = _conditions(run, request)
    given = load_conditioning(run, request)
    network = load_network(run, groups, weights=request.weights, checkpoint=checkpoint)
    second = low_noise_expert(run, groups, request.weights, checkpoint=checkpoint)
    sampling = (teacher_sampling if teacher else student_sampling)(run, steps=request.steps)
    seed, batch_size = run.sampling.seed, run.trainer.micro_batch_size
    batches = SampleBatches(text_LBD, null_text_L1D, seed, batch_size, given, second)
    request.output.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    writes = groups.token_shard == 0 and groups.pp_rank == 0
    with video_encoder(run, wanted=writes) as encoder:
        for indices, latents_BCTHW in batches(network, sampling):
            for index, latent_CTHW in zip(indices, latents_BCTHW, strict=True):
                require_finite(latent_CTHW, what=f"sample {index} ({names[index]!r}): latent")
                if writes:
                    _write(run, request, index, names[index], latent_CTHW.cpu(), encoder)
    dist.barrier()
    if dist.get_rank() == 0:
        evaluations = teacher_evaluations(request.steps, guidance=run.sampling.guidance) if teacher else request.steps
        seconds = (time.perf_counter() - start) / len(names)
        source = checkpoint or run.networks[request.weights].init
        print(f"{len(names)} samples of {request.weights} ({source}) in {request.output}: ", end="")
        print(f"{evaluations} network evaluations, {seconds:.2f} s each")
    dist.destroy_process_group()


def _completed(run: RunConfig, request: SampleRequest, *, teacher: bool) -> SampleRequest:
    """With the captions of the file among the prompts, and the number of steps."""
    default = run.sampling.teacher_steps if teacher else max(run.sampling.student_steps)
    prompts = (*request.prompts, *(read_prompts(request.prompts_file) if request.prompts_file else ()))
    steps = default if request.steps is None else request.steps
    return replace(request, prompts=prompts, prompts_file=None, steps=steps)


def _check(run: RunConfig, request: SampleRequest) -> None:
    """Everything that can be refused before ranks meet and weights are read."""
    check_encoders(run)
    if not (request.prompts or request.embeddings):
        raise InputError("nothing to sample: give --prompt, --prompts or --embedding")
    if request.prompts and run.encoders.text == "none":
        raise InputError(
            "got --prompt with encoders.text=none; set encoders.text to umt5 or t5, or give --embedding files"
        )
    check_conditioning(run, request)
    most = len(run.sampling.student_times) + 1
    if not is_trained(run, request.weights) or run.sampling.student_sampler == "flow_map":
        most = max(request.steps, 1)
    if not 1 <= request.steps <= most:
        raise InputError(
            f"got --steps {request.steps}, need 1 to {most} for {request.weights}; "
            "sampling.student_times has one time for every step of the student but the first"
        )


def _conditions(run: RunConfig, request: SampleRequest) -> tuple[list[str], Tensor, Tensor | None]:
    """Name and text embedding [L, N, D] of every sample, and of the unconditional branch [L, 1, D] where guidance takes it."""
    model = run.model
    guided = not is_trained(run, request.weights) and needs_guidance(run.sampling.guidance)
    own_null = guided and run.data.negative_embedding is None  # then it is encoded with the prompts: one load
    captions = [*request.prompts, *([None] if own_null else [])]
    text = encode_captions(run, captions) if captions else torch.empty(model.text_len, 0, model.text_dim)
    null_text = text[:, -1:] if own_null else load_null_text(run) if guided else None
    encoded = [text[:, : len(request.prompts)]]
    for path in request.embeddings:
        encoded.append(load_caption_embedding(path, text_len=model.text_len, text_dim=model.text_dim)[:, None])
    names = [*request.prompts, *(path.stem for path in request.embeddings)]
    names = [name for name in names for _ in range(request.copies)]
    return names, torch.cat(encoded, dim=1).repeat_interleave(request.copies, dim=1), null_text


def _write(
    run: RunConfig, request: SampleRequest, index: int, name: str, latent_CTHW: Tensor, encoder: VideoEncoder | None
) -> None:
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60]
    path = request.output / f"{index:04d}_{slug}.safetensors"
    facts = {"prompt": name, "weights": request.weights, "steps": str(request.steps), "seed": str(run.sampling.seed)}
    save_safetensors({"latent": latent_CTHW.contiguous()}, path, metadata={**facts, "sample": str(index)})
    if encoder is not None:
        video_CTHW = encoder.decode(latent_CTHW[None])[0]
        require_finite(video_CTHW, what=f"sample {index} ({name!r}): decoded video")
        frames_THWC = to_frames(video_CTHW)
        write_mp4(path.with_suffix(".mp4"), frames_THWC, fps=run.sampling.fps)
