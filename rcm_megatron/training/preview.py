"""Samples written while a run trains: the student's, and its EMA's, for captions of the current batch."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from rcm_megatron.config import RunConfig
from rcm_megatron.data.dali import Batch
from rcm_megatron.data.media import frame_strip, to_frames, write_mp4, write_png
from rcm_megatron.data.video_statistics import mean_statistics, video_statistics
from rcm_megatron.files import save_safetensors
from rcm_megatron.finite import NonFiniteError, require_finite
from rcm_megatron.inference.conditioning import Conditioning
from rcm_megatron.inference.encoding import video_encoder
from rcm_megatron.inference.sampler import LowNoiseExpert, Sampler, student_videos
from rcm_megatron.models.encoders import VideoEncoder
from rcm_megatron.parallel.pipeline import unwrapped
from rcm_megatron.platform.device import this_device
from rcm_megatron.runtime.stopping import StopRequest
from rcm_megatron.training.trained import TrainedNetwork


@dataclass(frozen=True, kw_only=True)
class Previews:
    """What was written, on rank 0; nothing on others."""

    videos: Mapping[str, tuple[Path, str]] = field(default_factory=dict)
    """{name: (MP4 file, caption)}."""
    statistics: Mapping[str, float] = field(default_factory=dict)
    """{preview/<weights>_<n>_steps/<statistic>: mean over its videos}: they fall when a student collapses, before losses say anything."""


def write_previews(
    run: RunConfig,
    students: Sequence[TrainedNetwork],
    batch: Batch,
    null_text_L1D: Tensor,
    *,
    iteration: int,
    stop: StopRequest,
) -> Previews:
    """Sample the student (one network, or two) on all ranks; rank 0 writes ``<output_dir>/previews/<iteration>/…``.

    Captions, images and given frames (as many as the first of ``distillation.conditional_frames``) are those of the first samples of the
    micro-batch, so that no text encoder is needed; noise is that of ``sampling.seed``, the same at every iteration. Without a video
    encoder the latents are written, and no MP4. Ends early when the run is told to stop: videos of a large model take longer than the two
    minutes before a time limit.
    """
    sampler, latents = _sampler(run, students, batch, null_text_L1D), {}
    averages = [student.ema for student in students if student.ema is not None]
    for weights, swapped_in in ({"student": []} | ({"ema": averages} if averages else {})).items():
        if stop.agreed():
            return Previews()
        with ExitStack() as stack:
            for ema in swapped_in:
                stack.enter_context(ema.swapped_in())
            for steps, latents_BCTHW in student_videos(sampler, run.sampling).items():
                latents[f"{weights}_{steps}_steps"] = latents_BCTHW.cpu()
    _require_finite_everywhere(latents, iteration)
    if dist.get_rank() != 0:
        return Previews()
    folder = Path(run.output_dir) / "previews" / f"{iteration:07d}"
    with video_encoder(run) as encoder:  # after sampling, so that its memory is free again for the VAE
        written = [
            _write(encoder, folder, name, latents_BCTHW, batch.prompts, run.sampling.fps, stop)
            for name, latents_BCTHW in latents.items()
        ]
    return Previews(
        videos={name: shown for each in written for name, shown in each.videos.items()},
        statistics={name: value for each in written for name, value in each.statistics.items()},
    )


def _sampler(run: RunConfig, students: Sequence[TrainedNetwork], batch: Batch, null_text_L1D: Tensor) -> Sampler:
    """Of the first samples of the batch, by the student's one network or two."""
    count = min(run.sampling.num_samples, len(batch.prompts))
    text_LBD = batch.text_LBD[:, :count].to(this_device())
    null_LBD = null_text_L1D.expand(-1, count, -1)
    network, low_noise = unwrapped(students[0].chunks[0]), None
    layout = network.layout
    if len(students) > 1:
        low_noise = LowNoiseExpert(students[1].chunks, run.distillation.expert_boundary)
    condition = _given(run, batch, count).condition(network.model, layout, count, this_device())
    seed = run.sampling.seed
    return Sampler(students[0].chunks, layout, text_LBD, null_LBD, seed, range(count), condition, low_noise)


def _given(run: RunConfig, batch: Batch, count: int) -> Conditioning:
    """What the first `count` samples of the batch are given."""
    frames = run.distillation.conditional_frames
    return Conditioning(
        latent_BCTHW=None if frames is None else batch.latent_BCTHW[:count],
        frames=0 if frames is None else frames[0],
        image_latent_BCTHW=None if batch.image_latent_BCTHW is None else batch.image_latent_BCTHW[:count],
        image_LBD=None if batch.image_LBD is None else batch.image_LBD[:, :count],
    )


def _require_finite_everywhere(latents: Mapping[str, Tensor], iteration: int) -> None:
    """NonFiniteError on every rank where one of them has made a latent that is not finite: none waits for it afterwards."""
    found = ""
    try:
        for name, latents_BCTHW in latents.items():
            for i, latent_CTHW in enumerate(latents_BCTHW):
                require_finite(latent_CTHW, what=f"preview of iteration {iteration}, {name}, sample {i}: latent")
    except NonFiniteError as error:
        found = str(error)
    everywhere: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(everywhere, found)
    if message := next(filter(None, everywhere), None):
        raise NonFiniteError(message)


def _write(
    encoder: VideoEncoder | None,
    folder: Path,
    name: str,
    latents_BCTHW: Tensor,
    prompts: tuple[str, ...],
    fps: int,
    stop: StopRequest,
) -> Previews:
    folder.mkdir(parents=True, exist_ok=True)
    captions = {f"prompt_{i}": prompt for i, prompt in enumerate(prompts[: len(latents_BCTHW)])}
    save_safetensors({"latents": latents_BCTHW.contiguous()}, folder / f"{name}.safetensors", metadata=captions)
    if encoder is None:
        return Previews()
    videos, looks = {}, []
    for i, latent_CTHW in enumerate(latents_BCTHW):
        if stop.noted:
            break
        video_CTHW = encoder.decode(latent_CTHW[None])[0]
        require_finite(video_CTHW, what=f"preview {folder.name}/{name}, sample {i}: decoded video")
        looks.append(video_statistics(video_CTHW))
        frames_THWC = to_frames(video_CTHW)
        write_png(folder / f"{name}_{i}.png", frame_strip(frames_THWC))
        path = write_mp4(folder / f"{name}_{i}.mp4", frames_THWC, fps=fps)
        videos[f"previews/{name}/{i}"] = (path, prompts[i])
    # a mean over some of the videos would not be comparable with those before
    means = mean_statistics(looks) if len(looks) == len(latents_BCTHW) else {}
    return Previews(videos=videos, statistics={f"preview/{name}/{key}": value for key, value in means.items()})
