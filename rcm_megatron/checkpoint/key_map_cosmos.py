"""Cosmos-Predict2: names and shapes of every parameter in diffusers' CosmosTransformer3DModel and in this program.

As in key_map_wan a row holds for both directions, and tensors of attention are joined to one, rows interleaved per head. No linear has a
bias, and the patch embedding is a Linear in both. Shapes: h hidden, r rank of the modulation, f ffn, L text dim, d head dim, pi and po
numbers in a token (pi with mask channels), t, y, x the tables of learned positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rcm_megatron.checkpoint.key_map_wan import Entry

if TYPE_CHECKING:
    from rcm_megatron.config import ModelConfig

_BEFORE = (
    ("patch_embedding.weight", "patch_embed.proj.weight", "h pi"),
    ("positions.pos_emb_t", "learnable_pos_embed.pos_emb_t", "t h"),
    ("positions.pos_emb_h", "learnable_pos_embed.pos_emb_h", "y h"),
    ("positions.pos_emb_w", "learnable_pos_embed.pos_emb_w", "x h"),
    ("time_embedding.linear_1.weight", "time_embed.t_embedder.linear_1.weight", "h h"),
    ("time_embedding.linear_2.weight", "time_embed.t_embedder.linear_2.weight", "3h h"),
    ("time_embedding.norm_weight", "time_embed.norm.weight", "h"),
)
_BLOCK = (
    ("self_attn_modulation.linear_1.weight", "norm1.linear_1.weight", "r h"),
    ("self_attn_modulation.linear_2.weight", "norm1.linear_2.weight", "3h r"),
    ("self_attn.linear_qkv.weight", "attn1.to_q.weight attn1.to_k.weight attn1.to_v.weight", "3h h"),
    ("self_attn.q_norm.weight", "attn1.norm_q.weight", "d"),
    ("self_attn.k_norm.weight", "attn1.norm_k.weight", "d"),
    ("self_attn.linear_proj.weight", "attn1.to_out.0.weight", "h h"),
    ("cross_attn_modulation.linear_1.weight", "norm2.linear_1.weight", "r h"),
    ("cross_attn_modulation.linear_2.weight", "norm2.linear_2.weight", "3h r"),
    ("cross_attn.linear_q.weight", "attn2.to_q.weight", "h h"),
    ("cross_attn.linear_kv.weight", "attn2.to_k.weight attn2.to_v.weight", "2h L"),
    ("cross_attn.q_norm.weight", "attn2.norm_q.weight", "d"),
    ("cross_attn.k_norm.weight", "attn2.norm_k.weight", "d"),
    ("cross_attn.linear_proj.weight", "attn2.to_out.0.weight", "h h"),
    ("mlp_modulation.linear_1.weight", "norm3.linear_1.weight", "r h"),
    ("mlp_modulation.linear_2.weight", "norm3.linear_2.weight", "3h r"),
    ("mlp.linear_fc1.weight", "ff.net.0.proj.weight", "f h"),
    ("mlp.linear_fc2.weight", "ff.net.2.weight", "h f"),
)
_AFTER = (
    ("head.modulation.linear_1.weight", "norm_out.linear_1.weight", "r h"),
    ("head.modulation.linear_2.weight", "norm_out.linear_2.weight", "2h r"),
    ("head.linear.weight", "proj_out.weight", "po h"),
)


@dataclass(frozen=True)
class CosmosKeyMap:
    """The names of one format, `internal` or `diffusers`."""

    name: str
    prefix: str = ""

    def entries(self, config: ModelConfig) -> dict[str, Entry]:
        """Internal name -> Entry for every parameter of the model, in the order in which the network runs."""
        sizes = _sizes(config)
        entries = [
            self._entry(row, sizes, "", "")
            for row in _BEFORE
            if config.cosmos.learnable_positions or not row[0].startswith("positions.")
        ]
        for index in range(config.num_layers):
            scopes = (f"blocks.{index}.", f"transformer_blocks.{index}.")
            entries += [self._entry(row, sizes, *scopes) for row in _BLOCK]
        entries += [self._entry(row, sizes, "", "") for row in _AFTER]
        return {entry.internal: entry for entry in entries}

    def _entry(self, row: tuple[str, str, str], sizes: dict[str, int], scope: str, diffusers_scope: str) -> Entry:
        internal, diffusers, letters = row
        shape = tuple(sizes[letter] for letter in letters.split())
        if self.name == "internal":
            return Entry(scope + internal, (scope + internal,), shape, shape, sizes["d"])
        names = tuple(diffusers_scope + name for name in diffusers.split())
        return Entry(scope + internal, names, shape, (shape[0] // len(names), *shape[1:]), sizes["d"])


def _sizes(config: ModelConfig) -> dict[str, int]:
    h = config.hidden_size
    sizes = {"h": h, "2h": 2 * h, "3h": 3 * h, "d": config.head_dim, "f": config.ffn_hidden_size, "L": config.text_dim}
    tables = (size // patch for size, patch in zip(config.cosmos.max_size, config.patch_size, strict=True))
    sizes |= dict(zip("tyx", tables, strict=True)) | {"r": config.cosmos.adaln_lora_dim}
    return sizes | {
        "pi": config.embedded_channels * config.patch_volume,
        "po": config.out_channels * config.patch_volume,
    }


KEY_MAPS: dict[str, CosmosKeyMap] = {name: CosmosKeyMap(name) for name in ("diffusers", "internal")}
