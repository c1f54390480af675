"""Encoders and data against the network and the stages."""

from __future__ import annotations

from collections.abc import Iterator

from rcm_megatron.config.run import RunConfig
from rcm_megatron.registries import OBJECTIVES, settings_of


def _image_encoder(config: RunConfig) -> Iterator[str]:
    image = config.encoders.image
    if image != "none" and config.model.image.dim is None:
        yield f"encoders.image={image}, but the network attends to no image (model.image_dim=null); set encoders.image to none"


def _null_texts(config: RunConfig) -> set[str | None]:
    """The captions that the objectives ask an unconditional branch with: "negative", "empty", or None."""
    names = config.objectives_used
    return {OBJECTIVES[name].null_text(settings_of(name, config.objectives), config.distillation) for name in names}


def _empty_caption(config: RunConfig) -> Iterator[str]:
    encoders = config.encoders
    own_null = config.data.negative_embedding is None and encoders.negative_prompt is None
    if encoders.text in ("umt5", "t5") and own_null and "empty" in _null_texts(config):
        yield (
            "encoders.negative_prompt=null is the release's negative prompt, but caption dropout needs the empty "
            'caption; set encoders.negative_prompt to ""'
        )


def _negative_embedding(config: RunConfig) -> Iterator[str]:
    absent = config.data.negative_embedding is None and config.encoders.text == "none"
    if absent and _null_texts(config) - {None}:
        yield (
            "data.negative_embedding=null with encoders.text=none: guidance and caption dropout need the embedding of "
            "the empty or negative caption; name its file"
        )


INPUT_RULES = (_image_encoder, _empty_caption, _negative_embedding)
