"""Cosmos-Predict2: names and shapes of every parameter in this program, diffusers' CosmosTransformer3DModel and NVIDIA's release.

NVIDIA's names are those of cosmos_predict2/models/text2image_dit.py. No linear has a bias, and the patch embedding is a Linear everywhere.
Shapes: h hidden, r rank of the modulation, f ffn, L text dim, d head dim, pi and po numbers in a token (pi with mask channels), t, y, x the
tables of learned positions.
"""

from __future__ import annotations

from rcm_megatron.families.cosmos.settings import CosmosModelConfig
from rcm_megatron.families.key_map import KeyTable, Row


def _row(internal: str, diffusers: str, nvidia: str, shape: str) -> Row:
    return Row((internal, diffusers, nvidia), {"": shape})


def _weight(internal: str, diffusers: str, nvidia: str, shape: str) -> Row:
    return Row((internal, diffusers, nvidia), {".weight": shape})


_BEFORE = (
    _weight("patch_embedding", "patch_embed.proj", "x_embedder.proj.1", "h pi"),
    _row("positions.pos_emb_t", "learnable_pos_embed.pos_emb_t", "extra_pos_embedder.pos_emb_t", "t h"),
    _row("positions.pos_emb_h", "learnable_pos_embed.pos_emb_h", "extra_pos_embedder.pos_emb_h", "y h"),
    _row("positions.pos_emb_w", "learnable_pos_embed.pos_emb_w", "extra_pos_embedder.pos_emb_w", "x h"),
    _weight("time_embedding.linear_1", "time_embed.t_embedder.linear_1", "t_embedder.1.linear_1", "h h"),
    _weight("time_embedding.linear_2", "time_embed.t_embedder.linear_2", "t_embedder.1.linear_2", "3h h"),
    _row("time_embedding.norm_weight", "time_embed.norm.weight", "t_embedding_norm.weight", "h"),
)
_INTERVAL = (
    _weight("interval_embedding.linear_1", "", "", "h h"),
    _weight("interval_embedding.linear_2", "", "", "3h h"),
    _row("interval_embedding.norm_weight", "", "", "h"),
)
"""Of a second time, which no other program's class of Cosmos has."""
_BLOCK = (
    _weight("self_attn_modulation.linear_1", "norm1.linear_1", "adaln_modulation_self_attn.1", "r h"),
    _weight("self_attn_modulation.linear_2", "norm1.linear_2", "adaln_modulation_self_attn.2", "3h r"),
    _weight(
        "self_attn.linear_qkv",
        "attn1.to_q attn1.to_k attn1.to_v",
        "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
        "3h h",
    ),
    _weight("self_attn.q_norm", "attn1.norm_q", "self_attn.q_norm", "d"),
    _weight("self_attn.k_norm", "attn1.norm_k", "self_attn.k_norm", "d"),
    _weight("self_attn.linear_proj", "attn1.to_out.0", "self_attn.output_proj", "h h"),
    _weight("cross_attn_modulation.linear_1", "norm2.linear_1", "adaln_modulation_cross_attn.1", "r h"),
    _weight("cross_attn_modulation.linear_2", "norm2.linear_2", "adaln_modulation_cross_attn.2", "3h r"),
    _weight("cross_attn.linear_q", "attn2.to_q", "cross_attn.q_proj", "h h"),
    _weight("cross_attn.linear_kv", "attn2.to_k attn2.to_v", "cross_attn.k_proj cross_attn.v_proj", "2h L"),
    _weight("cross_attn.q_norm", "attn2.norm_q", "cross_attn.q_norm", "d"),
    _weight("cross_attn.k_norm", "attn2.norm_k", "cross_attn.k_norm", "d"),
    _weight("cross_attn.linear_proj", "attn2.to_out.0", "cross_attn.output_proj", "h h"),
    _weight("mlp_modulation.linear_1", "norm3.linear_1", "adaln_modulation_mlp.1", "r h"),
    _weight("mlp_modulation.linear_2", "norm3.linear_2", "adaln_modulation_mlp.2", "3h r"),
    _weight("mlp.linear_fc1", "ff.net.0.proj", "mlp.layer1", "f h"),
    _weight("mlp.linear_fc2", "ff.net.2", "mlp.layer2", "h f"),
)
_AFTER = (
    _weight("head.modulation.linear_1", "norm_out.linear_1", "final_layer.adaln_modulation.1", "r h"),
    _weight("head.modulation.linear_2", "norm_out.linear_2", "final_layer.adaln_modulation.2", "2h r"),
    _weight("head.linear", "proj_out", "final_layer.linear", "po h"),
)


def _sizes(model: CosmosModelConfig) -> dict[str, int]:
    h, volume = model.hidden_size, model.patch_volume
    sizes = {"h": h, "2h": 2 * h, "3h": 3 * h, "d": model.head_dim, "f": model.ffn_hidden_size, "L": model.text_dim}
    tables = (size // patch for size, patch in zip(model.max_size, model.patch_size, strict=True))
    sizes |= dict(zip("tyx", tables, strict=True)) | {"r": model.adaln_lora_dim}
    return sizes | {"pi": model.embedded_channels * volume, "po": model.out_channels * volume}


def _absent(model: CosmosModelConfig) -> tuple[str, ...]:
    absent = () if model.learnable_positions else ("positions.",)
    return absent if model.second_time else (*absent, "interval_")


TABLE = KeyTable(("internal", "diffusers", "nvidia"), _BEFORE + _INTERVAL, _BLOCK, _AFTER, sizes=_sizes, absent=_absent)
