"""Cosmos-Predict2: names and shapes of every parameter in diffusers' CosmosTransformer3DModel, NVIDIA's release and this program.

A row: our name, diffusers', NVIDIA's (cosmos_predict2/models/text2image_dit.py), shape. As in key_map_wan a row holds for all directions,
and tensors of attention are joined to one, rows interleaved per head. No linear has a bias, and the patch embedding is a Linear everywhere.
Shapes: h hidden, r rank of the modulation, f ffn, L text dim, d head dim, pi and po numbers in a token (pi with mask channels), t, y, x the
tables of learned positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rcm_megatron.checkpoint.errors import CheckpointError, nearest
from rcm_megatron.checkpoint.key_map_wan import Entry
from rcm_megatron.config import CosmosConfig

if TYPE_CHECKING:
    from rcm_megatron.config import ModelConfig

_BEFORE = (
    ("patch_embedding.weight", "patch_embed.proj.weight", "x_embedder.proj.1.weight", "h pi"),
    ("positions.pos_emb_t", "learnable_pos_embed.pos_emb_t", "extra_pos_embedder.pos_emb_t", "t h"),
    ("positions.pos_emb_h", "learnable_pos_embed.pos_emb_h", "extra_pos_embedder.pos_emb_h", "y h"),
    ("positions.pos_emb_w", "learnable_pos_embed.pos_emb_w", "extra_pos_embedder.pos_emb_w", "x h"),
    ("time_embedding.linear_1.weight", "time_embed.t_embedder.linear_1.weight", "t_embedder.1.linear_1.weight", "h h"),
    ("time_embedding.linear_2.weight", "time_embed.t_embedder.linear_2.weight", "t_embedder.1.linear_2.weight", "3h h"),
    ("time_embedding.norm_weight", "time_embed.norm.weight", "t_embedding_norm.weight", "h"),
)
_BLOCK = (
    ("self_attn_modulation.linear_1.weight", "norm1.linear_1.weight", "adaln_modulation_self_attn.1.weight", "r h"),
    ("self_attn_modulation.linear_2.weight", "norm1.linear_2.weight", "adaln_modulation_self_attn.2.weight", "3h r"),
    (
        "self_attn.linear_qkv.weight",
        "attn1.to_q.weight attn1.to_k.weight attn1.to_v.weight",
        "self_attn.q_proj.weight self_attn.k_proj.weight self_attn.v_proj.weight",
        "3h h",
    ),
    ("self_attn.q_norm.weight", "attn1.norm_q.weight", "self_attn.q_norm.weight", "d"),
    ("self_attn.k_norm.weight", "attn1.norm_k.weight", "self_attn.k_norm.weight", "d"),
    ("self_attn.linear_proj.weight", "attn1.to_out.0.weight", "self_attn.output_proj.weight", "h h"),
    ("cross_attn_modulation.linear_1.weight", "norm2.linear_1.weight", "adaln_modulation_cross_attn.1.weight", "r h"),
    ("cross_attn_modulation.linear_2.weight", "norm2.linear_2.weight", "adaln_modulation_cross_attn.2.weight", "3h r"),
    ("cross_attn.linear_q.weight", "attn2.to_q.weight", "cross_attn.q_proj.weight", "h h"),
    (
        "cross_attn.linear_kv.weight",
        "attn2.to_k.weight attn2.to_v.weight",
        "cross_attn.k_proj.weight cross_attn.v_proj.weight",
        "2h L",
    ),
    ("cross_attn.q_norm.weight", "attn2.norm_q.weight", "cross_attn.q_norm.weight", "d"),
    ("cross_attn.k_norm.weight", "attn2.norm_k.weight", "cross_attn.k_norm.weight", "d"),
    ("cross_attn.linear_proj.weight", "attn2.to_out.0.weight", "cross_attn.output_proj.weight", "h h"),
    ("mlp_modulation.linear_1.weight", "norm3.linear_1.weight", "adaln_modulation_mlp.1.weight", "r h"),
    ("mlp_modulation.linear_2.weight", "norm3.linear_2.weight", "adaln_modulation_mlp.2.weight", "3h r"),
    ("mlp.linear_fc1.weight", "ff.net.0.proj.weight", "mlp.layer1.weight", "f h"),
    ("mlp.linear_fc2.weight", "ff.net.2.weight", "mlp.layer2.weight", "h f"),
)
_AFTER = (
    ("head.modulation.linear_1.weight", "norm_out.linear_1.weight", "final_layer.adaln_modulation.1.weight", "r h"),
    ("head.modulation.linear_2.weight", "norm_out.linear_2.weight", "final_layer.adaln_modulation.2.weight", "2h r"),
    ("head.linear.weight", "proj_out.weight", "final_layer.linear.weight", "po h"),
)


@dataclass(frozen=True)
class CosmosKeyMap:
    """The names of one format. `scope` is what block i's keys begin with; `prefix` is written in front of every key."""

    column: int
    scope: str
    prefix: str = ""

    def entries(self, config: ModelConfig) -> dict[str, Entry]:
        """Internal name -> Entry for every parameter of the model, in the order in which the network runs."""
        sizes = _sizes(config)
        entries = [
            self._entry(row, sizes, None)
            for row in _BEFORE
            if config.cosmos.learnable_positions or not row[0].startswith("positions.")
        ]
        for index in range(config.num_layers):
            entries += [self._entry(row, sizes, index) for row in _BLOCK]
        entries += [self._entry(row, sizes, None) for row in _AFTER]
        return {entry.internal: entry for entry in entries}

    def names(self) -> Iterator[str]:
        """Every parameter's name, of any network, a block's number written as `#`."""
        for outside, table in (("", _BEFORE + _AFTER), (f"{self.scope}.#.", _BLOCK)):
            yield from (outside + name for row in table for name in row[self.column].split())

    def _entry(self, row: tuple[str, str, str, str], sizes: dict[str, int], block: int | None) -> Entry:
        inside, outside = ("", "") if block is None else (f"blocks.{block}.", f"{self.scope}.{block}.")
        shape = tuple(sizes[letter] for letter in row[-1].split())
        names = tuple(outside + name for name in row[self.column].split())
        return Entry(inside + row[0], names, shape, (shape[0] // len(names), *shape[1:]), sizes["d"])


def _sizes(config: ModelConfig) -> dict[str, int]:
    h = config.hidden_size
    sizes = {"h": h, "2h": 2 * h, "3h": 3 * h, "d": config.head_dim, "f": config.ffn_hidden_size, "L": config.text_dim}
    tables = (size // patch for size, patch in zip(config.cosmos.max_size, config.patch_size, strict=True))
    sizes |= dict(zip("tyx", tables, strict=True)) | {"r": config.cosmos.adaln_lora_dim}
    return sizes | {
        "pi": config.embedded_channels * config.patch_volume,
        "po": config.out_channels * config.patch_volume,
    }


KEY_MAPS: dict[str, CosmosKeyMap] = {
    "diffusers": CosmosKeyMap(column=1, scope="transformer_blocks"),
    "nvidia": CosmosKeyMap(column=2, scope="blocks", prefix="net."),
    "internal": CosmosKeyMap(column=0, scope="blocks"),
}

# ---- NVIDIA's files, which come without a config.json

NVIDIA_MARKS = {"x_embedder.proj.1.weight", "final_layer.linear.weight"}
_NO_WEIGHTS = ("._extra_state", "pos_embedder.seq", "pos_embedder.dim_spatial_range", "pos_embedder.dim_temporal_range")
_NO_WEIGHTS += ("accum_video_sample_counter", "accum_image_sample_counter", "accum_iteration", "accum_train_in_hours")
_ROPE_SCALES = {
    (1280, False): (1.0, 4.0, 4.0),
    (2048, False): (1.0, 4.0, 4.0),
    (5120, False): (1.0, 4.0, 4.0),
    (2048, True): (1.0, 3.0, 3.0),
    (5120, True): (20 / 24, 2.0, 2.0),
}
"""(hidden size, takes given frames) of a release -> rope_scale: the extrapolation ratios in cosmos_predict2/configs/base."""


def is_no_weight(name: str) -> bool:
    """Whether a key of NVIDIA's files is a counter, a constant of RoPE, or Transformer Engine's state: not part of the network."""
    return name.endswith(_NO_WEIGHTS)


def model_config_from_shapes(
    shapes: Mapping[str, tuple[int, ...]], *, overrides: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """ModelConfig fields of weights in NVIDIA's naming, for latents of 16 channels and patches (1, 2, 2) unless `overrides` says otherwise.

    RoPE's scale shows in no shape: it is known for the released widths, else `overrides` gives `rope_scale`. q/k norms compute with
    eps 1e-6, as the release does. Without the padding mask's channel a network of given frames cannot be told from one without.
    """
    overrides = dict(overrides or {})
    own = {name: _shape(shapes, f"{name}.weight") for name in _CONFIG_SHAPES}
    hidden, embedded = own["x_embedder.proj.1"]
    (head_dim,) = own["blocks.0.self_attn.q_norm"]
    patch = tuple(overrides.pop("patch_size", (1, 2, 2)))
    channels = own["final_layer.linear"][0] // math.prod(patch)
    masks = embedded // math.prod(patch) - channels
    if masks not in (0, 1, 2):
        raise CheckpointError(
            f"x_embedder.proj.1.weight takes {embedded} numbers a token and final_layer.linear gives {own['final_layer.linear'][0]}; need "
            "equal numbers, or one or two channels more for the padding mask and the mask of given frames; or another patch_size"
        )
    scale = overrides.pop("rope_scale", _ROPE_SCALES.get((hidden, masks == 2)))
    if scale is None:
        raise CheckpointError(f"hidden_size={hidden}: RoPE's scale shows in no weight; pass rope_scale (--rope-scale)")
    learnable = "extra_pos_embedder.pos_emb_t" in shapes
    tables = [shapes[f"extra_pos_embedder.pos_emb_{axis}"][0] for axis in "thw"] if learnable else (128, 120, 120)
    cosmos = CosmosConfig(
        adaln_lora_dim=own["final_layer.adaln_modulation.1"][0],
        rope_scale=tuple(scale),
        max_size=tuple(rows * step for rows, step in zip(tables, patch, strict=True)),
        conditional_frames=masks == 2,
        padding_mask=masks > 0,
        learnable_positions=learnable,
        qk_norm_eps=1e-6,
    )
    fields = {
        "family": "cosmos",
        "cosmos": cosmos,
        "wan": None,
        "num_layers": 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")),
        "hidden_size": hidden,
        "num_heads": own["blocks.0.self_attn.q_proj"][0] // head_dim,
        "ffn_hidden_size": own["blocks.0.mlp.layer1"][0],
        "in_channels": channels,
        "out_channels": channels,
        "patch_size": patch,
        "text_dim": own["blocks.0.cross_attn.k_proj"][1],
        "text_len": 512,
        "freq_dim": hidden,
        "eps": 1e-6,
        "cross_attn_norm": False,
        "rope_max_seq_len": max(tables),
    }
    return {**fields, **overrides}


_CONFIG_SHAPES = (
    "x_embedder.proj.1",
    "final_layer.linear",
    "final_layer.adaln_modulation.1",
    "blocks.0.self_attn.q_norm",
)
_CONFIG_SHAPES += ("blocks.0.self_attn.q_proj", "blocks.0.mlp.layer1", "blocks.0.cross_attn.k_proj")


def _shape(shapes: Mapping[str, tuple[int, ...]], name: str) -> tuple[int, ...]:
    if name not in shapes:
        raise CheckpointError(f"missing key {name!r}{nearest(name, shapes)}: not NVIDIA's Cosmos-Predict2")
    return shapes[name]
