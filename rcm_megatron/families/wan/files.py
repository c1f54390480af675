"""Wan in the formats that know it: diffusers' folders, the Wan release's, NVlabs/rcm's files."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from rcm_megatron.errors import CheckpointError
from rcm_megatron.families.family import Fields, Naming, Shapes
from rcm_megatron.families.fields import Columns, checked, require, require_class, shape_of, translated
from rcm_megatron.families.key_map import KeyMap
from rcm_megatron.families.wan.key_rows import TABLE
from rcm_megatron.families.wan.settings import WanModelConfig

DIFFUSERS_CLASS = "WanTransformer3DModel"
_HEADS = {1536: 12, 3072: 24, 5120: 40}
"""Hidden size of a released network -> its heads."""
_TI2V_CHANNELS = 48
"""Of Wan2.2's VAE, whose one network takes given frames: neither its weights nor diffusers' config.json say so."""
_RELEASE_CLASS = "WanModel"
_MODEL_TYPES = ("t2v", "i2v", "flf2v", "ti2v")
_DEFAULTS: Fields = {"text_len": 512}

_DIFFUSERS_COLUMNS: Columns = {
    "num_layers": ("num_layers", 40),
    "num_heads": ("num_attention_heads", 40),
    "ffn_hidden_size": ("ffn_dim", 13824),
    "in_channels": ("in_channels", 16),
    "out_channels": ("out_channels", 16),
    "patch_size": ("patch_size", (1, 2, 2)),
    "text_dim": ("text_dim", 4096),
    "freq_dim": ("freq_dim", 256),
    "eps": ("eps", 1e-6),
    "cross_attn_norm": ("cross_attn_norm", True),
    "rope_max_seq_len": ("rope_max_seq_len", 1024),
}
"""With the defaults of WanTransformer3DModel."""
_RELEASE_COLUMNS: Columns = {
    "num_layers": ("num_layers", 32),
    "hidden_size": ("dim", 2048),
    "num_heads": ("num_heads", 16),
    "ffn_hidden_size": ("ffn_dim", 8192),
    "in_channels": ("in_dim", 16),
    "out_channels": ("out_dim", 16),
    "patch_size": ("patch_size", (1, 2, 2)),
    "text_dim": ("text_dim", 4096),
    "text_len": ("text_len", 512),
    "freq_dim": ("freq_dim", 256),
    "eps": ("eps", 1e-6),
    "cross_attn_norm": ("cross_attn_norm", True),
}
"""With the defaults of the release's WanModel."""


def from_diffusers(config: Mapping[str, Any], shapes: Shapes) -> Fields:
    """Settings from the `config.json` of WanTransformer3DModel, which says nothing of text_len."""
    require_class(config, DIFFUSERS_CLASS)
    require(config, "qk_norm", "rms_norm_across_heads", "q/k normalisation across all heads (Wan2.1)")
    fields = translated(config, _DIFFUSERS_COLUMNS)
    fields["out_channels"] = fields["out_channels"] or fields["in_channels"]
    fields["hidden_size"] = fields["num_heads"] * config.get("attention_head_dim", 128)
    image_dim = config.get("image_dim")
    width = None if image_dim is None else fields["hidden_size"]
    keys = {"added_kv_proj_dim": None, **config}
    require(keys, "added_kv_proj_dim", width, "keys of images see the hidden size, with image_dim")
    conditions = _conditions(
        fields, image_dim, config.get("pos_embed_seq_len"), conditional_frames=_has_given_frames(fields)
    )
    return checked({**_DEFAULTS, **fields, **conditions})


def to_diffusers(model: WanModelConfig) -> dict[str, Any]:
    """The `config.json` that WanTransformer3DModel.from_pretrained reads."""
    fields = {theirs: getattr(model, ours) for ours, (theirs, _) in _DIFFUSERS_COLUMNS.items()}
    fields |= {"patch_size": list(model.patch_size), "qk_norm": "rms_norm_across_heads"}
    fields |= {"in_channels": model.embedded_channels, "attention_head_dim": model.head_dim}
    fields |= {"image_dim": model.image_dim, "pos_embed_seq_len": model.image_positions}
    fields["added_kv_proj_dim"] = None if model.image_dim is None else model.hidden_size
    return {"_class_name": DIFFUSERS_CLASS, "_diffusers_version": "0.33.0", **dict(sorted(fields.items()))}


def from_release(config: Mapping[str, Any], shapes: Shapes) -> Fields:
    """Settings from the `config.json` of a Wan release folder.

    `shapes` of its weights tell image-to-video of Wan2.1, with CLIP, from that of Wan2.2: their files say the same.
    Raises CheckpointError for a network of another kind.
    """
    why = "the class of the Wan release; move a config.json of another model away"
    require(config, "_class_name", _RELEASE_CLASS, why)
    kind = config.get("model_type", "t2v")
    if kind not in _MODEL_TYPES:
        raise CheckpointError(f"config.json: model_type={kind!r}; need one of {', '.join(_MODEL_TYPES)}")
    for field, need in (("qk_norm", True), ("window_size", (-1, -1))):
        require(config, field, need, "the setting of the released models")
    fields = translated(config, _RELEASE_COLUMNS)
    conditions = _conditions(fields, *_clip_of_shapes(shapes), conditional_frames=kind == "ti2v")
    return checked({**_DEFAULTS, **fields, **conditions})


def to_release(model: WanModelConfig) -> dict[str, Any]:
    """The `config.json` of a Wan release folder."""
    fields = {theirs: getattr(model, ours) for ours, (theirs, _) in _RELEASE_COLUMNS.items()}
    fields |= {"in_dim": model.embedded_channels, "patch_size": list(model.patch_size)}
    head = {
        "_class_name": _RELEASE_CLASS,
        "_diffusers_version": "0.30.0",
        "model_type": _model_type(model),
    }
    return {**head, **dict(sorted(fields.items()))}


def from_shapes(shapes: Shapes, overrides: Mapping[str, Any]) -> Fields:
    """Settings of weights in the naming of the Wan release that come without a `config.json`.

    The head count shows in no shape: it is known for Wan's own widths (head dim 128), else `overrides` must give it, as it may give every
    other field (patch_size of a Linear patch embedding: default (1, 2, 2); eps: 1e-6).
    Raises CheckpointError for what is missing and not given.
    """
    patch_weight = _shape(shapes, "patch_embedding.weight")
    hidden = patch_weight[0]
    patch = tuple(patch_weight[2:]) or tuple(overrides.get("patch_size", (1, 2, 2)))
    heads = overrides.get("num_heads", _HEADS.get(hidden))
    if heads is None:
        raise CheckpointError(
            f"hidden_size={hidden}: the number of heads shows in no weight; pass num_heads (--num-heads)"
        )
    blocks = {int(match[1]) for name in shapes if (match := re.match(r"blocks\.(\d+)\.", name))}
    fields = {
        "num_layers": max(blocks, default=-1) + 1,
        "hidden_size": hidden,
        "num_heads": heads,
        "ffn_hidden_size": _shape(shapes, "blocks.0.ffn.0.weight")[0],
        "in_channels": math.prod(patch_weight[1:]) // math.prod(patch),
        "out_channels": _shape(shapes, "head.head.weight")[0] // math.prod(patch),
        "patch_size": patch,
        "text_dim": _shape(shapes, "text_embedding.0.weight")[-1],
        "freq_dim": _shape(shapes, "time_embedding.0.weight")[-1],
        "cross_attn_norm": "blocks.0.norm3.weight" in shapes,
    }
    fields |= _conditions(fields, *_clip_of_shapes(shapes), conditional_frames=_has_given_frames(fields))
    return checked({**_DEFAULTS, **fields, **overrides})


def _has_given_frames(fields: Mapping[str, Any]) -> bool:
    return fields["in_channels"] == fields["out_channels"] == _TI2V_CHANNELS


def _conditions(
    fields: Mapping[str, Any], image_dim: int | None, image_positions: int | None, *, conditional_frames: bool
) -> Fields:
    """`in_channels` and what the network takes beside text, of a file whose `in_channels` count those of an image condition as well."""
    total, latent = fields["in_channels"], fields["out_channels"]
    if total < latent:
        raise CheckpointError(
            f"in_channels={total} must be at least out_channels={latent}: the latent's, and a condition's"
        )
    return {
        "in_channels": latent,
        "condition_channels": total - latent,
        "image_dim": image_dim,
        "image_positions": image_positions,
        "conditional_frames": conditional_frames,
    }


def _clip_of_shapes(shapes: Shapes) -> tuple[int | None, int | None]:
    """Width of CLIP's features and how many have a position, in the naming of the Wan release."""
    weight, positions = shapes.get("img_emb.proj.1.weight"), shapes.get("img_emb.emb_pos")
    return weight and weight[-1], positions and positions[1]


def _model_type(model: WanModelConfig) -> str:
    if model.image_positions is not None:
        return "flf2v"
    if model.image_dim is not None or model.condition_channels:
        return "i2v"
    return "ti2v" if model.conditional_frames else "t2v"


def _shape(shapes: Shapes, name: str) -> tuple[int, ...]:
    return shape_of(shapes, name, "a Wan network")


def _is_diffusers(shapes: Shapes) -> bool:
    return any(name.startswith("condition_embedder.") for name in shapes)


def _patch_dims(shapes: Shapes) -> int | None:
    """Dimensions of the patch embedding in the release's naming, or None."""
    if any(name.startswith("text_embedding.") for name in shapes) and "text_embedding.linear_1.weight" not in shapes:
        return len(shapes.get("patch_embedding.weight", ())) or None
    return None


NAMINGS: dict[str, Naming] = {
    "diffusers": Naming(
        key_map=KeyMap(TABLE, "diffusers", conv_patch=True),
        is_used_by=_is_diffusers,
        is_config=lambda config: config.get("_class_name") == DIFFUSERS_CLASS,
        read_config=from_diffusers,
        write_config=to_diffusers,
        no_weights=(".attn2.norm_added_q.weight",),  # of Wan2.1 image-to-video; diffusers ignores them too
    ),
    "wan": Naming(
        key_map=KeyMap(TABLE, "wan", conv_patch=True),
        is_used_by=lambda shapes: _patch_dims(shapes) == 5,
        is_config=lambda config: config.get("_class_name") == _RELEASE_CLASS,
        read_config=from_release,
        write_config=to_release,
        read_shapes=from_shapes,
    ),
    "nvlabs": Naming(
        key_map=KeyMap(TABLE, "wan", prefix="net."),
        is_used_by=lambda shapes: _patch_dims(shapes) not in (None, 5),
        read_config=from_release,
        read_shapes=from_shapes,
    ),
    "internal": Naming(
        key_map=KeyMap(TABLE, "internal"),
        second_time=True,
        is_used_by=lambda shapes: "text_embedding.linear_1.weight" in shapes,
    ),
}
