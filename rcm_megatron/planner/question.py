"""What `rcm plan` is asked about beside a configuration, as overrides of it: a larger teacher, videos of another size."""

from __future__ import annotations

import json
from collections.abc import Iterator

from rcm_megatron.config import ConfigError, RunConfig, load_config
from rcm_megatron.config.loader import as_dict
from rcm_megatron.registries import FAMILIES
from rcm_megatron.requests import PlanRequest

VIDEO_FPS = 16
"""Of `--seconds`: Wan's."""


def asked(run: RunConfig, request: PlanRequest) -> Iterator[str]:
    """KEY=VALUE of `run` for the request's teacher, resolution and seconds. Raises ConfigError for what no latent can be."""
    time, space = FAMILIES[run.model.family].vae_factors(run.latent.channels)
    if request.resolution is not None:
        for axis, pixels in zip(("height", "width"), request.resolution, strict=True):
            if pixels % space:
                below = pixels // space * space
                raise ConfigError(
                    f"--resolution: got {axis} {pixels}, need a multiple of {space}, which the VAE makes one; {below} is one"
                )
            yield f"latent.{axis}={pixels // space}"
    if request.seconds is not None:
        if not 0 < request.seconds < float("inf"):
            raise ConfigError(f"--seconds: got {request.seconds:g}, need a number greater than 0")
        yield f"latent.frames={round(request.seconds * VIDEO_FPS / time) + 1}"
    if request.teacher is not None:
        yield from _of_teacher(run, load_config(request.teacher))


def _of_teacher(run: RunConfig, other: RunConfig) -> Iterator[str]:
    """The student begins as what was its teacher; the fake score as the new one."""
    yield f"networks.student.init={json.dumps(run.init_of('student'))}"
    for role in ("teacher", "fake_score"):
        if role in run.networks:
            yield f"networks.{role}.model={json.dumps(as_dict(other.model))}"
            yield f"networks.{role}.init={json.dumps(other.init_of('teacher'))}"
