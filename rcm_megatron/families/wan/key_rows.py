"""Wan2.1 and 2.2: names and shapes of every parameter in this program, diffusers' WanTransformer3DModel and the Wan release.

Shapes: h hidden, f ffn, pi and po numbers in a token (pi with a condition's channels), L text dim, q frequency dim; of images g width of
CLIP's features, j tokens that have a position.
"""

from __future__ import annotations

from rcm_megatron.families.key_map import KeyTable, Row
from rcm_megatron.families.wan.settings import WanModelConfig


def _row(internal: str, diffusers: str, wan: str, shapes: dict[str, str]) -> Row:
    return Row((internal, diffusers, wan), shapes)


def _linear(out_dim: str, in_dim: str) -> dict[str, str]:
    return {".weight": f"{out_dim} {in_dim}", ".bias": out_dim}


def _norm(dim: str) -> dict[str, str]:
    return {".weight": dim, ".bias": dim}


_BEFORE = (
    _row("patch_embedding", "patch_embedding", "patch_embedding", _linear("h", "pi")),
    _row("text_embedding.linear_1", "condition_embedder.text_embedder.linear_1", "text_embedding.0", _linear("h", "L")),
    _row("text_embedding.linear_2", "condition_embedder.text_embedder.linear_2", "text_embedding.2", _linear("h", "h")),
    _row("time_embedding.linear_1", "condition_embedder.time_embedder.linear_1", "time_embedding.0", _linear("h", "q")),
    _row("time_embedding.linear_2", "condition_embedder.time_embedder.linear_2", "time_embedding.2", _linear("h", "h")),
    _row("time_projection", "condition_embedder.time_proj", "time_projection.1", _linear("6h", "h")),
    _row("image_embedding.positions", "condition_embedder.image_embedder.pos_embed", "img_emb.emb_pos", {"": "1 j g"}),
    _row("image_embedding.norm_1", "condition_embedder.image_embedder.norm1", "img_emb.proj.0", _norm("g")),
    _row(
        "image_embedding.linear_1",
        "condition_embedder.image_embedder.ff.net.0.proj",
        "img_emb.proj.1",
        _linear("g", "g"),
    ),
    _row("image_embedding.linear_2", "condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3", _linear("h", "g")),
    _row("image_embedding.norm_2", "condition_embedder.image_embedder.norm2", "img_emb.proj.4", _norm("h")),
)
_INTERVAL = (
    _row("interval_embedding.linear_1", "", "", _linear("h", "q")),
    _row("interval_embedding.linear_2", "", "", _linear("h", "h")),
    _row("interval_projection", "", "", _linear("6h", "h")),
)
"""Of a second time, which no other program's class of Wan has."""
_BLOCK = (
    _row("modulation", "scale_shift_table", "modulation", {"": "1 6 h"}),
    _row(
        "self_attn.linear_qkv",
        "attn1.to_q attn1.to_k attn1.to_v",
        "self_attn.q self_attn.k self_attn.v",
        _linear("3h", "h"),
    ),
    _row("self_attn.q_norm", "attn1.norm_q", "self_attn.norm_q", {".weight": "h"}),
    _row("self_attn.k_norm", "attn1.norm_k", "self_attn.norm_k", {".weight": "h"}),
    _row("self_attn.linear_proj", "attn1.to_out.0", "self_attn.o", _linear("h", "h")),
    # The affine norm before cross-attention: the second of three in diffusers' order, `norm3` in the Wan release.
    _row("norm3", "norm2", "norm3", _norm("h")),
    _row("cross_attn.linear_q", "attn2.to_q", "cross_attn.q", _linear("h", "h")),
    _row("cross_attn.linear_kv", "attn2.to_k attn2.to_v", "cross_attn.k cross_attn.v", _linear("2h", "h")),
    _row("cross_attn.q_norm", "attn2.norm_q", "cross_attn.norm_q", {".weight": "h"}),
    _row("cross_attn.k_norm", "attn2.norm_k", "cross_attn.norm_k", {".weight": "h"}),
    _row(
        "cross_attn.image_linear_kv",
        "attn2.add_k_proj attn2.add_v_proj",
        "cross_attn.k_img cross_attn.v_img",
        _linear("2h", "h"),
    ),
    _row("cross_attn.image_k_norm", "attn2.norm_added_k", "cross_attn.norm_k_img", {".weight": "h"}),
    _row("cross_attn.linear_proj", "attn2.to_out.0", "cross_attn.o", _linear("h", "h")),
    _row("mlp.linear_fc1", "ffn.net.0.proj", "ffn.0", _linear("f", "h")),
    _row("mlp.linear_fc2", "ffn.net.2", "ffn.2", _linear("h", "f")),
)
_AFTER = (
    _row("head.modulation", "scale_shift_table", "head.modulation", {"": "1 2 h"}),
    _row("head.linear", "proj_out", "head.head", _linear("po", "h")),
)


def _sizes(model: WanModelConfig) -> dict[str, int | None]:
    h, patch = model.hidden_size, model.patch_volume
    sizes = {"h": h, "2h": 2 * h, "3h": 3 * h, "6h": 6 * h, "f": model.ffn_hidden_size}
    sizes |= {"L": model.text_dim, "q": model.freq_dim, "pi": model.embedded_channels * patch}
    sizes |= {"g": model.image_dim, "j": model.image_positions}
    return sizes | {"po": model.out_channels * patch}


def _absent(model: WanModelConfig) -> tuple[str, ...]:
    absent = () if model.cross_attn_norm else ("norm3",)
    absent = absent if model.second_time else (*absent, "interval_")
    if model.image_dim is None:
        return (*absent, "image_embedding.", "cross_attn.image_")
    return absent if model.image_positions else (*absent, "image_embedding.positions")


TABLE = KeyTable(("internal", "diffusers", "wan"), _BEFORE + _INTERVAL, _BLOCK, _AFTER, sizes=_sizes, absent=_absent)
