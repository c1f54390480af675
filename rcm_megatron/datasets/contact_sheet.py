"""Verifies a dataset folder, prints its statistics, draws a contact sheet. Status 1 if anything is damaged.

    rcm inspect-dataset data/wan_480p --decode Wan2.1-T2V-1.3B-Diffusers --output sheet.png

Every shard's SHA-256 and every member is read: it takes as long as reading the folder. Without --decode, pictures show latents: one or
three channels as they are, of more the three main directions in which they vary (PCA), each stretched to grey levels.
"""

from __future__ import annotations

from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from rcm_megatron.data.media import contact_sheet, to_frames, write_png
from rcm_megatron.data.samples import decode_tensor
from rcm_megatron.data.scan import LATENT
from rcm_megatron.data.shards import ShardReader
from rcm_megatron.datasets.inspection import Inspection, inspect_dataset
from rcm_megatron.errors import InputError
from rcm_megatron.models.encoders import WanVideoEncoder
from rcm_megatron.requests import InspectDatasetRequest

_SHOWN_PROBLEMS = 50
_FRAME_HEIGHT = 240
_QUANTILE = 0.01
"""Of a latent's values at either end, which stretching to grey levels lets go."""


def report(found: Inspection) -> str:
    """The statistics as text."""
    manifest, lines = found.manifest, []
    checked = f"{found.num_checksums} of {len(manifest.shards)} shards have a checksum"
    lines.append(f"{manifest.folder}: {len(manifest)} samples, {checked}; fingerprint {manifest.fingerprint}")
    if found.samples:
        summary, shapes = found.statistics.summary(), found.samples[0].shapes
        lengths, prompts = summary["text_length"], [facts.prompt for facts in found.samples]
        lines.append(f"latents {list(shapes[0])}, embeddings of width {shapes[1][-1]}")
        lines.append(f"text positions: {lengths['min']} to {lengths['max']}, mean {lengths['mean']}")
        lines.append(f"prompts: {len(set(prompts))} distinct, {sum(not prompt.strip() for prompt in prompts)} empty")
        lines.append("channel      mean       std")
        rows = zip(summary["latent_mean"], summary["latent_std"], strict=True)
        lines += [f"{channel:7d} {mean:9.4f} {std:9.4f}" for channel, (mean, std) in enumerate(rows)]
    lines += [f"outlier: {line}" for line in found.outliers[:_SHOWN_PROBLEMS]]
    lines += [f"DAMAGED: {line}" for line in found.problems[:_SHOWN_PROBLEMS]]
    if len(found.problems) > _SHOWN_PROBLEMS:
        lines.append(f"and {len(found.problems) - _SHOWN_PROBLEMS} more")
    lines.append("damaged" if found.problems else "whole")
    return "\n".join(lines)


def draw(found: Inspection, *, samples: int, frames: int, decode: Path | None) -> np.ndarray:
    """The contact sheet [H, W, 3] of samples spread evenly over the dataset, `frames` of each."""
    chosen = [found.samples[i] for i in np.linspace(0, len(found.samples) - 1, samples).round().astype(int)]
    latents = [_latent(found, facts.row) for facts in chosen]
    if decode is None:
        videos = [_preview(latent_CTHW) for latent_CTHW in latents]
    else:
        with closing(WanVideoEncoder(decode / "vae")) as encoder:
            videos = [encoder.decode(latent_CTHW[None])[0] for latent_CTHW in latents]
    times = [np.linspace(0, video.shape[1] - 1, min(frames, video.shape[1])).round().astype(int) for video in videos]
    strips = [to_frames(_small(video[:, time])) for video, time in zip(videos, times, strict=True)]
    kind = "latents" if decode is None else "decoded"
    title = f"{found.manifest.folder.name}: {len(chosen)} of {len(found.manifest)} samples, {kind}"
    return contact_sheet(strips, captions=[f"{facts.key}: {facts.prompt}" for facts in chosen], title=title)


def _latent(found: Inspection, row: int) -> Tensor:
    record = found.manifest.record(row)
    member = record.members[LATENT]
    data = ShardReader(found.manifest.folder).read(
        record.shard, offset=member.offset, size=member.size, shard_size=record.shard_size
    )
    latent = decode_tensor(data, member.format)
    return torch.from_numpy(latent.reshape(latent.shape[-4:]).copy())


def _small(video_CTHW: Tensor) -> Tensor:
    height, width = video_CTHW.shape[2:]
    scale = min(1.0, _FRAME_HEIGHT / height)
    size = (round(height * scale), round(width * scale))
    return torch.nn.functional.interpolate(video_CTHW.float(), size=size, mode="area")


def _preview(latent_CTHW: Tensor) -> Tensor:
    """Something to look at in [-1, 1], [1 or 3, T, H, W]."""
    if len(latent_CTHW) not in (1, 3):
        values_XC = latent_CTHW.flatten(1).T.double()
        values_XC -= values_XC.mean(dim=0)
        directions_CC = torch.linalg.svd(values_XC.T @ values_XC).U
        directions_CC *= directions_CC.sum(
            dim=0
        ).sign()  # a direction and its opposite are one: always the same picture
        latent_CTHW = torch.einsum("ctxy,cd->dtxy", latent_CTHW.double(), directions_CC[:, :3])
    if latent_CTHW.shape[0] == 2:
        latent_CTHW = latent_CTHW[:1]
    values_CX = latent_CTHW.double().flatten(1)
    low, high = (values_CX.quantile(q, dim=1).view(-1, 1, 1, 1) for q in (_QUANTILE, 1 - _QUANTILE))
    return 2 * (latent_CTHW - low) / (high - low).clamp(min=1e-6) - 1


def inspect_and_draw(request: InspectDatasetRequest) -> int:
    """Print the statistics and write the contact sheet; exit status 1 where anything is damaged. Raises UserError."""
    if min(request.samples, request.frames) < 1:
        raise InputError(f"got --samples {request.samples} --frames {request.frames}, need at least 1")
    found = inspect_dataset(request.folder, progress=partial(tqdm, unit="sample", disable=None))
    print(report(found))
    if request.output is not None and found.samples:
        samples = min(request.samples, len(found.samples))
        write_png(request.output, draw(found, samples=samples, frames=request.frames, decode=request.decode))
    return 1 if found.problems else 0
