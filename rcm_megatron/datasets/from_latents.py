"""A dataset whose latents went through pixels once more: decoded, clamped to [-1, 1] and encoded, each by the run's VAE.

The loader of the official code does this with every sample of the published dataset, at every step; here a latent is used as it is stored.

Shapes: C channels, T latent frames, H, W.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from rcm_megatron.config import RunConfig
from rcm_megatron.data.manifest import DatasetError, load_or_build_manifest
from rcm_megatron.data.samples import SampleError, SampleSource
from rcm_megatron.datasets.build import NEGATIVE_EMBED_NAME, BuiltSample, Unit
from rcm_megatron.datasets.ranks import Made, built_sample, make_units, open_build, report
from rcm_megatron.errors import InputError
from rcm_megatron.inference.conditioning import image_shapes
from rcm_megatron.inference.encoding import check_encoders, video_encoder
from rcm_megatron.inference.networks import init_parallel
from rcm_megatron.models.encoders import VideoEncoder
from rcm_megatron.requests import LatentsRequest

_UNIT_SIZE = 4


def build_from_latents(run: RunConfig, request: LatentsRequest) -> None:
    """Encode a dataset again; every rank takes its share. InputError or DatasetError for what cannot be met."""
    check_encoders(run)
    if run.encoders.video == "none":
        raise InputError("got encoders.video=none, need the video encoder of the latents; set it to wan_vae")
    manifest = load_or_build_manifest(request.data, on_error=request.on_error)
    source = SampleSource(
        manifest,
        seed=0,
        latent_shape=run.latent.shape_CTHW,
        text_len=run.model.text_len,
        text_dim=run.model.text_dim,
        on_error="raise",
        **image_shapes(run),
    )
    init_parallel(run)
    recipe = {"source": "latents", "data": manifest.fingerprint, "built_from": manifest.description.get("build")}
    build, left = open_build(run, request, num_samples=len(manifest), unit_size=_UNIT_SIZE, recipe=lambda: recipe)
    if left:
        negative = request.data / NEGATIVE_EMBED_NAME
        if dist.get_rank() == 0 and negative.is_file():
            build.put_file(NEGATIVE_EMBED_NAME, negative.read_bytes())
        with video_encoder(run) as encoder:

            def make(unit: Unit) -> Made:
                return _make(run, request, source, encoder, unit)

            make_units(build, left[dist.get_rank() :: dist.get_world_size()], make, writes=True)
    report(build)


def _make(run: RunConfig, request: LatentsRequest, source: SampleSource, encoder: VideoEncoder, unit: Unit) -> Made:
    samples: list[BuiltSample] = []
    skipped: dict[int, str] = {}
    for index in unit.indices:
        try:
            fields = source.load(source.manifest.record(index))
        except SampleError as error:
            if request.on_error == "raise":
                raise DatasetError(f"{error} (--on-error skip leaves it out)") from error
            skipped[index] = str(error)
            continue
        prompt = fields.pop("prompt")
        tensors = {name: torch.from_numpy(array.copy()) for name, array in fields.items()}
        pixels_1CTHW = encoder.decode(tensors["latent_CTHW"][None]).clamp(-1, 1)
        tensors["latent_CTHW"] = encoder.encode(pixels_1CTHW)[0]
        samples.append(built_sample(request, index, prompt=prompt, text_len=run.model.text_len, **tensors))
    return samples, skipped
