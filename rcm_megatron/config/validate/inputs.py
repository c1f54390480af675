"""Encoders and data against the network and the stages."""

from __future__ import annotations

from collections.abc import Iterator

from rcm_megatron.config.run import RunConfig


def _image_encoder(config: RunConfig) -> Iterator[str]:
    image, wan = config.encoders.image, config.model.wan
    if image != "none" and (wan is None or wan.image_dim is None):
        yield f"encoders.image={image}, but the network attends to no image (model.wan.image_dim=null); set encoders.image to none"


def _drops_captions(config: RunConfig) -> bool:
    return config.distillation.flow.caption_dropout > 0 and any(stage.losses.flow for stage in config.stages)


def _empty_caption(config: RunConfig) -> Iterator[str]:
    encoders = config.encoders
    own_null = config.data.negative_embedding is None and encoders.negative_prompt is None
    if encoders.text in ("umt5", "t5") and own_null and _drops_captions(config):
        yield (
            "encoders.negative_prompt=null is the release's negative prompt, but caption dropout of flow matching needs the empty "
            'caption; set encoders.negative_prompt to ""'
        )


def _negative_embedding(config: RunConfig) -> Iterator[str]:
    guided = set(config.roles) > set(config.trained_roles) and config.distillation.teacher_guidance > 1
    absent = config.data.negative_embedding is None and config.encoders.text == "none"
    if absent and (guided or _drops_captions(config)):
        yield (
            "data.negative_embedding=null with encoders.text=none: guidance and caption dropout need the embedding of "
            "the empty or negative caption; name its file"
        )


INPUT_RULES = (_image_encoder, _empty_caption, _negative_embedding)
