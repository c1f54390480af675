"""Networks, their latents and their weights against what the stages ask of them."""

from __future__ import annotations

from collections.abc import Iterator

from rcm_megatron.config.advice import multiples_near
from rcm_megatron.config.declare import Change, Problem
from rcm_megatron.config.model import WAN_MASK_CHANNELS
from rcm_megatron.config.run import RunConfig

AXES = ("frames", "height", "width")


def _channels(config: RunConfig) -> Iterator[Problem]:
    channels, of_network = config.latent.channels, config.model.in_channels
    if channels != of_network:
        yield Problem(
            f"latent.channels={channels} must equal model.in_channels={of_network}",
            (Change("latent.channels", (of_network,)),),
            "set both alike",
        )


def _patches(config: RunConfig) -> Iterator[Problem]:
    sizes, patches = config.latent.shape_CTHW[1:], config.model.patch_size
    for axis, size, patch in zip(AXES, sizes, patches, strict=True):
        if size % patch:
            yield Problem(
                f"latent.{axis}={size} must divide by {patch} (model.patch_size={list(patches)})",
                (Change(f"latent.{axis}", multiples_near(size, patch), most=2),),
            )


def _positions(config: RunConfig) -> Iterator[Problem]:
    latent, model = config.latent, config.model
    for axis, size, patch in zip(AXES, latent.shape_CTHW[1:], model.patch_size, strict=True):
        if size // patch > model.rope_max_seq_len:
            yield Problem(
                f"latent.{axis}={size} makes {size // patch} tokens on an axis, more than "
                f"model.rope_max_seq_len={model.rope_max_seq_len}",
                (
                    Change("model.rope_max_seq_len", (max(latent.shape_CTHW[1:]),)),
                    Change(f"latent.{axis}", (model.rope_max_seq_len * patch,)),
                ),
            )
    if model.cosmos is not None and model.cosmos.learnable_positions:
        for axis, size, most in zip(AXES, latent.shape_CTHW[1:], model.cosmos.max_size, strict=True):
            if size > most:
                yield Problem(
                    f"latent.{axis}={size} exceeds model.cosmos.max_size={list(model.cosmos.max_size)}",
                    (Change(f"latent.{axis}", range(most, 0, -1)),),
                )


def _image_channels(config: RunConfig) -> Iterator[str]:
    wan, need = config.model.wan, WAN_MASK_CHANNELS + config.latent.channels
    if wan is not None and wan.condition_channels not in (0, need):
        yield (
            f"model.wan.condition_channels={wan.condition_channels} must be {need}: a mask of {WAN_MASK_CHANNELS} channels and an "
            f"image's latent of latent.channels={config.latent.channels}; or 0 for none"
        )


def _stage_list(config: RunConfig) -> Iterator[str]:
    """A run has stages, told apart by name."""
    if not config.stages:
        yield "stages: got [], need at least one with name, steps and losses"
    names = [stage.name for stage in config.stages]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"stages: the name {name!r} is used twice; names label metrics and checkpoints, make them differ"


def _weights(config: RunConfig) -> Iterator[str]:
    if config.needs_teacher and config.init.teacher is None:
        yield "init.teacher=null, but a stage distils; name a diffusers folder with config.json and safetensors"
    if config.needs_fake_score and config.fake_score_optimizer is None:
        yield "fake_score_optimizer=null, but a stage has a DMD weight; give it at least lr"


def _experts(config: RunConfig) -> Iterator[str]:
    low_noise, boundary = config.init.teacher_low_noise, config.distillation.expert_boundary
    if (low_noise is None) != (boundary is None):
        yield (
            f"init.teacher_low_noise={low_noise or 'null'} with distillation.expert_boundary={boundary or 'null'}; give both for a teacher "
            "of two networks, or none"
        )
    if low_noise is not None and config.init.teacher is None:
        yield "init.teacher=null with init.teacher_low_noise given; name the network of high noise as init.teacher"


def _conditional_frames(config: RunConfig) -> Iterator[str]:
    given, takes = config.distillation.conditional_frames, config.model.conditional_frames
    if given and not takes:
        yield (
            f"distillation.conditional_frames={list(given)}, but the network takes none; set null, or conditional_frames in model.cosmos "
            "(Video2World) or model.wan (TI2V)"
        )
    if takes and not given:
        yield "distillation.conditional_frames is required with conditional_frames; e.g. [1, 2] (Video2World), [0, 1] (TI2V)"
    if given and max(given) >= config.latent.frames:
        yield f"distillation.conditional_frames={list(given)} must hold numbers from 0 to {config.latent.frames - 1} (latent.frames - 1)"


NETWORK_RULES = (_stage_list, _channels, _patches, _positions, _image_channels, _weights, _experts, _conditional_frames)
