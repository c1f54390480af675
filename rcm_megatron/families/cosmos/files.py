"""Cosmos-Predict2 in the formats that know it: diffusers' folders and NVIDIA's files, which come without a config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rcm_megatron.errors import CheckpointError
from rcm_megatron.families.cosmos.key_rows import TABLE
from rcm_megatron.families.cosmos.settings import CosmosModelConfig
from rcm_megatron.families.family import Fields, Naming, Shapes
from rcm_megatron.families.fields import Columns, checked, require, require_class, shape_of, translated
from rcm_megatron.families.key_map import KeyMap

DIFFUSERS_CLASS = "CosmosTransformer3DModel"
_DIFFUSERS_COLUMNS: Columns = {
    "num_layers": ("num_layers", 28),
    "num_heads": ("num_attention_heads", 32),
    "out_channels": ("out_channels", 16),
    "patch_size": ("patch_size", (1, 2, 2)),
    "text_dim": ("text_embed_dim", 1024),
    "adaln_lora_dim": ("adaln_lora_dim", 256),
    "rope_scale": ("rope_scale", (2.0, 1.0, 1.0)),
    "max_size": ("max_size", (128, 240, 240)),
    "padding_mask": ("concat_padding_mask", True),
}
"""With the defaults of CosmosTransformer3DModel."""
_DEFAULTS: Fields = {"text_len": 512}

_ROPE_SCALES = {
    (1280, False): (1.0, 4.0, 4.0),
    (2048, False): (1.0, 4.0, 4.0),
    (5120, False): (1.0, 4.0, 4.0),
    (2048, True): (1.0, 3.0, 3.0),
    (5120, True): (20 / 24, 2.0, 2.0),
}
"""(hidden size, takes given frames) of a release -> rope_scale: the extrapolation ratios in cosmos_predict2/configs/base."""
_NVIDIA_MARKS = {"x_embedder.proj.1.weight", "final_layer.linear.weight"}
_NVIDIA_NO_WEIGHTS = (
    "._extra_state",  # Transformer Engine's
    "pos_embedder.seq",
    "pos_embedder.dim_spatial_range",
    "pos_embedder.dim_temporal_range",
    "accum_video_sample_counter",
    "accum_image_sample_counter",
    "accum_iteration",
    "accum_train_in_hours",
)


def from_diffusers(config: Mapping[str, Any], shapes: Shapes) -> Fields:
    """Settings from the `config.json` of CosmosTransformer3DModel, which says nothing of text_len.

    Raises CheckpointError for a network of another kind.
    """
    require_class(config, DIFFUSERS_CLASS)
    for field in ("controlnet_block_every_n", "img_context_dim_in"):
        require(config, field, None, "a Predict2 network without control or image context")
    require(config, "use_crossattn_projection", False, "Predict2's text, not Predict2.5's")
    positions = config.get("extra_pos_embed_type", "learnable")
    if positions not in (None, "learnable"):
        raise CheckpointError(f"config.json: extra_pos_embed_type={positions!r}; need null or 'learnable'")
    fields = translated(config, _DIFFUSERS_COLUMNS)
    masks = config.get("in_channels", 16) - fields["out_channels"]
    if masks not in (0, 1):
        raise CheckpointError(
            f"config.json: in_channels={config.get('in_channels', 16)}, out_channels={fields['out_channels']}; need equal numbers, or "
            "one channel more for the mask of given frames"
        )
    patch, hidden = tuple(fields["patch_size"]), fields["num_heads"] * config.get("attention_head_dim", 128)
    fields |= {
        "conditional_frames": bool(masks),
        "learnable_positions": positions == "learnable",
        "in_channels": fields["out_channels"],
        "hidden_size": hidden,
        "ffn_hidden_size": int(hidden * config.get("mlp_ratio", 4.0)),
        "rope_max_seq_len": max(size // step for size, step in zip(fields["max_size"], patch, strict=True)),
    }
    return checked({**_DEFAULTS, **fields})


def to_diffusers(model: CosmosModelConfig) -> dict[str, Any]:
    """The `config.json` that CosmosTransformer3DModel.from_pretrained reads."""
    fields = {theirs: getattr(model, ours) for ours, (theirs, _) in _DIFFUSERS_COLUMNS.items()}
    fields |= {name: list(fields[name]) for name in ("patch_size", "rope_scale", "max_size")}
    fields |= {"in_channels": model.in_channels + model.conditional_frames}
    fields |= {"attention_head_dim": model.head_dim}
    fields |= {"mlp_ratio": model.ffn_hidden_size / model.hidden_size}
    fields |= {"extra_pos_embed_type": "learnable" if model.learnable_positions else None}
    return {"_class_name": DIFFUSERS_CLASS, "_diffusers_version": "0.34.0", **dict(sorted(fields.items()))}


def from_shapes(shapes: Shapes, overrides: Mapping[str, Any]) -> Fields:
    """Settings of weights in NVIDIA's naming, for latents of 16 channels and patches (1, 2, 2) unless `overrides` says otherwise.

    RoPE's scale shows in no shape: it is known for the released widths, else `overrides` gives `rope_scale`. q/k norms compute with
    eps 1e-6, as the release does. Without the padding mask's channel a network of given frames cannot be told from one without.
    Raises CheckpointError for what is missing and not given.
    """
    overrides = dict(overrides)
    own = {name: shape_of(shapes, f"{name}.weight", "NVIDIA's Cosmos-Predict2") for name in _CONFIG_SHAPES}
    hidden, embedded = own["x_embedder.proj.1"]
    (head_dim,) = own["blocks.0.self_attn.q_norm"]
    patch = tuple(overrides.pop("patch_size", (1, 2, 2)))
    channels, masks = _channels(embedded, own["final_layer.linear"][0], math.prod(patch))
    scale = overrides.pop("rope_scale", _ROPE_SCALES.get((hidden, masks == 2)))
    if scale is None:
        raise CheckpointError(f"hidden_size={hidden}: RoPE's scale shows in no weight; pass rope_scale (--rope-scale)")
    learnable = "extra_pos_embedder.pos_emb_t" in shapes
    tables = [shapes[f"extra_pos_embedder.pos_emb_{axis}"][0] for axis in "thw"] if learnable else (128, 120, 120)
    fields = {
        "adaln_lora_dim": own["final_layer.adaln_modulation.1"][0],
        "rope_scale": tuple(scale),
        "max_size": tuple(rows * step for rows, step in zip(tables, patch, strict=True)),
        "conditional_frames": masks == 2,
        "padding_mask": masks > 0,
        "learnable_positions": learnable,
        "qk_norm_eps": 1e-6,
        "num_layers": 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")),
        "hidden_size": hidden,
        "num_heads": own["blocks.0.self_attn.q_proj"][0] // head_dim,
        "ffn_hidden_size": own["blocks.0.mlp.layer1"][0],
        "in_channels": channels,
        "out_channels": channels,
        "patch_size": patch,
        "text_dim": own["blocks.0.cross_attn.k_proj"][1],
        "rope_max_seq_len": max(tables),
    }
    return {**_DEFAULTS, **fields, **overrides}


def _channels(numbers_in: int, numbers_out: int, patch_volume: int) -> tuple[int, int]:
    """(channels of the latent, of masks beside it) of a network that takes and gives so many numbers a token."""
    channels = numbers_out // patch_volume
    masks = numbers_in // patch_volume - channels
    if masks not in (0, 1, 2):
        raise CheckpointError(
            f"x_embedder.proj.1.weight takes {numbers_in} numbers a token and final_layer.linear gives {numbers_out}; need "
            "equal numbers, or one or two channels more for the padding mask and the mask of given frames; or another patch_size"
        )
    return channels, masks


_CONFIG_SHAPES = (
    "x_embedder.proj.1",
    "final_layer.linear",
    "final_layer.adaln_modulation.1",
    "blocks.0.self_attn.q_norm",
    "blocks.0.self_attn.q_proj",
    "blocks.0.mlp.layer1",
    "blocks.0.cross_attn.k_proj",
)

NAMINGS: dict[str, Naming] = {
    "diffusers": Naming(
        key_map=KeyMap(TABLE, "diffusers", blocks="transformer_blocks"),
        is_used_by=lambda shapes: any(name.startswith("transformer_blocks.") for name in shapes),
        is_config=lambda config: config.get("_class_name") == DIFFUSERS_CLASS,
        read_config=from_diffusers,
        write_config=to_diffusers,
    ),
    "nvidia": Naming(
        key_map=KeyMap(TABLE, "nvidia", prefix="net."),
        is_used_by=lambda shapes: bool(_NVIDIA_MARKS & shapes.keys()),
        read_shapes=from_shapes,
        no_weights=_NVIDIA_NO_WEIGHTS,
    ),
    "internal": Naming(
        key_map=KeyMap(TABLE, "internal"),
        second_time=True,
        is_used_by=lambda shapes: "time_embedding.norm_weight" in shapes,
    ),
}
