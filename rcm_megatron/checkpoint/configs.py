"""The `config.json` of each format <-> the fields of our ModelConfig, and a guess from shapes where there is none."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from rcm_megatron.checkpoint.errors import CheckpointError, nearest
from rcm_megatron.config import ConfigError, CosmosConfig, ModelConfig, WanConfig, as_dict, build

FIELDS = tuple(field.name for field in dataclasses.fields(ModelConfig))
_DEFAULTS = {
    "family": "wan",
    "cosmos": None,
    "wan": None,
    "text_len": 512,
    "eps": 1e-6,
    "cross_attn_norm": True,
    "rope_max_seq_len": 1024,
}
# Not visible in any tensor and without effect on the conversion: the run's own value may differ from the file's.
FREE_FIELDS = ("text_len", "rope_max_seq_len")
_FREE_OWN_FIELDS = {"cosmos": ("rope_fps", "condition_sigma", "qk_norm_eps"), "wan": ("conditional_frames",)}
_OWN_CONFIGS = {"cosmos": CosmosConfig, "wan": WanConfig}
_WAN_HEADS = {1536: 12, 3072: 24, 5120: 40}
_TI2V_CHANNELS = (
    48  # of Wan2.2's VAE, whose one network takes given frames: neither its weights nor diffusers' config.json say so
)
_MODEL_TYPES = ("t2v", "i2v", "flf2v", "ti2v")

# our field -> (diffusers field, default of WanTransformer3DModel)
_DIFFUSERS_FIELDS = {
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
# our field -> (field of the Wan release, default of its WanModel)
_WAN_FIELDS = {
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


# our field -> (diffusers field, default of CosmosTransformer3DModel)
_COSMOS_FIELDS = {
    "num_layers": ("num_layers", 28),
    "num_heads": ("num_attention_heads", 32),
    "out_channels": ("out_channels", 16),
    "patch_size": ("patch_size", (1, 2, 2)),
    "text_dim": ("text_embed_dim", 1024),
}
# field of CosmosConfig -> the same
_COSMOS_OWN_FIELDS = {
    "adaln_lora_dim": ("adaln_lora_dim", 256),
    "rope_scale": ("rope_scale", (2.0, 1.0, 1.0)),
    "max_size": ("max_size", (128, 240, 240)),
    "padding_mask": ("concat_padding_mask", True),
}


def config_format(config: Mapping[str, Any]) -> str | None:
    """Whose `config.json` it is, by its class or its own fields: it may lie beside weights in another naming. None: nobody's here."""
    classes = {"WanTransformer3DModel": "diffusers", "CosmosTransformer3DModel": "diffusers", "WanModel": "wan"}
    if (name := config.get("_class_name")) is not None:
        return classes.get(name)
    return "internal" if "hidden_size" in config and "num_heads" in config else None


def model_config_from_diffusers(config: Mapping[str, Any], *, text_len: int = 512) -> dict[str, Any]:
    """Keyword arguments for ModelConfig from a diffusers `config.json`; `text_len` is not stored there."""
    if config.get("_class_name") == "CosmosTransformer3DModel":
        return _cosmos_from_diffusers(config, text_len=text_len)
    if config.get("_class_name", "WanTransformer3DModel") != "WanTransformer3DModel":
        raise CheckpointError(
            f"config.json: _class_name={config['_class_name']!r}; need 'WanTransformer3DModel' or 'CosmosTransformer3DModel'"
        )
    _require(config, "qk_norm", "rms_norm_across_heads", "q/k normalisation across all heads (Wan2.1)")
    fields = _translate(config, _DIFFUSERS_FIELDS)
    fields["out_channels"] = fields["out_channels"] or fields["in_channels"]
    fields["hidden_size"] = fields["num_heads"] * config.get("attention_head_dim", 128)
    image_dim, positions = config.get("image_dim"), config.get("pos_embed_seq_len")
    width = None if image_dim is None else fields["hidden_size"]
    _require(
        {"added_kv_proj_dim": None, **config},
        "added_kv_proj_dim",
        width,
        "keys of images see the hidden size, with image_dim",
    )
    conditions = _conditions(fields, image_dim, positions, conditional_frames=_has_given_frames(fields))
    return _checked({**_DEFAULTS, **fields, **conditions, "text_len": text_len})


def _has_given_frames(fields: Mapping[str, Any]) -> bool:
    """Of Wan networks the one of Wan2.2's VAE takes given frames, which neither its weights nor diffusers' config.json say."""
    return fields["in_channels"] == fields["out_channels"] == _TI2V_CHANNELS


def _conditions(
    fields: Mapping[str, Any], image_dim: int | None, image_positions: int | None, *, conditional_frames: bool
) -> dict[str, Any]:
    """Wan's `in_channels` and `wan` of a file's fields, whose `in_channels` count those of an image condition as well."""
    total, latent = fields["in_channels"], fields["out_channels"]
    if total < latent:
        raise CheckpointError(
            f"in_channels={total} must be at least out_channels={latent}: the latent's, and a condition's"
        )
    wan = WanConfig(
        condition_channels=total - latent,
        image_dim=image_dim,
        image_positions=image_positions,
        conditional_frames=conditional_frames,
    )
    return {"in_channels": latent, "wan": None if wan == WanConfig() else wan}


def _cosmos_from_diffusers(config: Mapping[str, Any], *, text_len: int) -> dict[str, Any]:
    for field in ("controlnet_block_every_n", "img_context_dim_in"):
        _require(config, field, None, "a Predict2 network without control or image context")
    _require(config, "use_crossattn_projection", False, "Predict2's text, not Predict2.5's")
    positions = config.get("extra_pos_embed_type", "learnable")
    if positions not in (None, "learnable"):
        raise CheckpointError(f"config.json: extra_pos_embed_type={positions!r}; need null or 'learnable'")
    fields, own = _translate(config, _COSMOS_FIELDS), _translate(config, _COSMOS_OWN_FIELDS)
    masks = config.get("in_channels", 16) - fields["out_channels"]
    if masks not in (0, 1):
        raise CheckpointError(
            f"config.json: in_channels={config.get('in_channels', 16)}, out_channels={fields['out_channels']}; need equal numbers, or "
            "one channel more for the mask of given frames"
        )
    own |= {name: tuple(own[name]) for name in ("rope_scale", "max_size")}
    patch, hidden = tuple(fields["patch_size"]), fields["num_heads"] * config.get("attention_head_dim", 128)
    fields |= {
        "family": "cosmos",
        "cosmos": CosmosConfig(**own, conditional_frames=bool(masks), learnable_positions=positions == "learnable"),
        "in_channels": fields["out_channels"],
        "hidden_size": hidden,
        "ffn_hidden_size": int(hidden * config.get("mlp_ratio", 4.0)),
        "freq_dim": hidden,
        "cross_attn_norm": False,
        "rope_max_seq_len": max(size // step for size, step in zip(own["max_size"], patch, strict=True)),
    }
    return _checked({**_DEFAULTS, **fields, "text_len": text_len})


def _cosmos_diffusers_config(model_config: ModelConfig) -> dict[str, Any]:
    cosmos = model_config.cosmos
    fields = {theirs: getattr(model_config, ours) for ours, (theirs, _) in _COSMOS_FIELDS.items()}
    fields |= {theirs: getattr(cosmos, ours) for ours, (theirs, _) in _COSMOS_OWN_FIELDS.items()}
    fields |= {name: list(fields[name]) for name in ("patch_size", "rope_scale", "max_size")}
    fields |= {"in_channels": model_config.in_channels + cosmos.conditional_frames}
    fields |= {"attention_head_dim": model_config.head_dim}
    fields |= {"mlp_ratio": model_config.ffn_hidden_size / model_config.hidden_size}
    fields |= {"extra_pos_embed_type": "learnable" if cosmos.learnable_positions else None}
    return {"_class_name": "CosmosTransformer3DModel", "_diffusers_version": "0.34.0", **dict(sorted(fields.items()))}


def diffusers_config(model_config: ModelConfig) -> dict[str, Any]:
    """The `config.json` that `from_pretrained` of the family's class in diffusers reads."""
    if model_config.family == "cosmos":
        return _cosmos_diffusers_config(model_config)
    fields = {theirs: getattr(model_config, ours) for ours, (theirs, _) in _DIFFUSERS_FIELDS.items()}
    fields |= {"patch_size": list(model_config.patch_size), "qk_norm": "rms_norm_across_heads"}
    wan = model_config.wan or WanConfig()
    fields |= {"in_channels": model_config.embedded_channels, "attention_head_dim": model_config.head_dim}
    fields |= {"image_dim": wan.image_dim, "pos_embed_seq_len": wan.image_positions}
    fields["added_kv_proj_dim"] = None if wan.image_dim is None else model_config.hidden_size
    return {"_class_name": "WanTransformer3DModel", "_diffusers_version": "0.33.0", **dict(sorted(fields.items()))}


def model_config_from_wan(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, Any]:
    """Keyword arguments for ModelConfig from the `config.json` of a Wan release folder.

    `shapes` of its weights tell image-to-video of Wan2.1, with CLIP, from that of Wan2.2: their files say the same.
    """
    _require(
        config, "_class_name", "WanModel", "the class of the Wan release; move a config.json of another model away"
    )
    kind = config.get("model_type", "t2v")
    if kind not in _MODEL_TYPES:
        raise CheckpointError(f"config.json: model_type={kind!r}; need one of {', '.join(_MODEL_TYPES)}")
    for field, need in (("qk_norm", True), ("window_size", (-1, -1))):
        _require(config, field, need, "the setting of the released models")
    fields, clip = _translate(config, _WAN_FIELDS), _clip_of_shapes(shapes or {})
    return _checked({**_DEFAULTS, **fields, **_conditions(fields, *clip, conditional_frames=kind == "ti2v")})


def _clip_of_shapes(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int | None, int | None]:
    """Width of CLIP's features and how many have a position, in the naming of the Wan release."""
    weight, positions = shapes.get("img_emb.proj.1.weight"), shapes.get("img_emb.emb_pos")
    return weight and weight[-1], positions and positions[1]


def wan_config(model_config: ModelConfig) -> dict[str, Any]:
    """The `config.json` of a Wan release folder."""
    fields = {theirs: getattr(model_config, ours) for ours, (theirs, _) in _WAN_FIELDS.items()}
    fields |= {"in_dim": model_config.embedded_channels, "patch_size": list(model_config.patch_size)}
    return {
        "_class_name": "WanModel",
        "_diffusers_version": "0.30.0",
        "model_type": _model_type(model_config.wan or WanConfig()),
        **dict(sorted(fields.items())),
    }


def _model_type(wan: WanConfig) -> str:
    if wan.image_positions is not None:
        return "flf2v"
    if wan.image_dim is not None or wan.condition_channels:
        return "i2v"
    return "ti2v" if wan.conditional_frames else "t2v"


def model_config_from_internal(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for ModelConfig from the `config.json` of an internal folder: exactly our fields."""
    for name in config:
        if name not in FIELDS:
            raise CheckpointError(f"config.json: unknown field {name!r}{nearest(name, FIELDS)}")
    config = {**dict.fromkeys(_OWN_CONFIGS), **config}
    for name in FIELDS:
        if name not in config:
            raise CheckpointError(f"config.json: missing field {name!r}; write the folder again with `convert`")
    for name, cls in _OWN_CONFIGS.items():
        if config[name] is not None:
            try:
                config[name] = build(cls, config[name], path=name)
            except ConfigError as error:
                raise CheckpointError(f"config.json: {error}") from None
    return _checked(config)


def internal_config(model_config: ModelConfig) -> dict[str, Any]:
    """Our own `config.json`: the fields of ModelConfig."""
    return {
        name: value for name, value in as_dict(model_config).items() if name not in _OWN_CONFIGS or value is not None
    }


def model_config_from_shapes(
    shapes: Mapping[str, tuple[int, ...]], *, overrides: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """ModelConfig fields of weights in the naming of the Wan release that come without a `config.json`.

    The head count shows in no shape: it is known for Wan's own widths (head dim 128), else `overrides` must give it, as
    it may give every other field (patch_size of a Linear patch embedding: default (1, 2, 2); eps: 1e-6).
    """
    overrides = dict(overrides or {})
    patch_weight = _shape(shapes, "patch_embedding.weight")
    hidden = patch_weight[0]
    patch = tuple(patch_weight[2:]) or tuple(overrides.get("patch_size", (1, 2, 2)))
    heads = overrides.get("num_heads", _WAN_HEADS.get(hidden))
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
    return _checked({**_DEFAULTS, **fields, **overrides})


def check_same_network(source_fields: Mapping[str, Any], model_config: ModelConfig, *, where: str) -> None:
    """The file's configuration must describe the model that is being built (a wrong head count fits every shape)."""
    if different := differences(source_fields, model_config):
        listed = (f"{name}={got!r} (the run has {need!r})" for name, (got, need) in different.items())
        raise CheckpointError(f"{where} holds another network: {', '.join(listed)}; set the run's model to the file's")


def differences(source_fields: Mapping[str, Any], model_config: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """Field -> (the file's, the model's) where they are two networks."""
    different = {}
    for name in FIELDS:
        got, need = source_fields[name], getattr(model_config, name)
        got, need = (tuple(got), tuple(need)) if name == "patch_size" else (got, need)
        if name == "wan":
            got, need = got or WanConfig(), need or WanConfig()
        if name in _FREE_OWN_FIELDS and got is not None and need is not None:
            got = dataclasses.replace(got, **{free: getattr(need, free) for free in _FREE_OWN_FIELDS[name]})
        if name not in FREE_FIELDS and got != need:
            different[name] = (got, need)
    return different


def check_heads(hidden_size: int, num_heads: int) -> None:
    if num_heads < 1 or hidden_size % num_heads:
        raise CheckpointError(f"hidden_size={hidden_size} must divide by num_heads={num_heads}")


def _translate(config: Mapping[str, Any], fields: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    return {ours: config.get(theirs, default) for ours, (theirs, default) in fields.items()}


def _checked(fields: dict[str, Any]) -> dict[str, Any]:
    fields["patch_size"] = tuple(fields["patch_size"])
    check_heads(fields["hidden_size"], fields["num_heads"])
    if fields["in_channels"] != fields["out_channels"]:
        raise CheckpointError(
            f"in_channels={fields['in_channels']} must equal out_channels={fields['out_channels']}: both are the latent's"
        )
    return fields


def _require(config: Mapping[str, Any], field: str, need: Any, why: str) -> None:
    got = config.get(field, need)
    got = tuple(got) if isinstance(got, list) else got
    if got != need:
        raise CheckpointError(f"config.json: {field}={got!r}; need {need!r}: {why}")


def _shape(shapes: Mapping[str, tuple[int, ...]], name: str) -> tuple[int, ...]:
    if name not in shapes:
        raise CheckpointError(f"missing key {name!r}{nearest(name, shapes)}: not a Wan network")
    return shapes[name]
