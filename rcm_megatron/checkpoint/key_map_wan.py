"""Wan2.1 and 2.2: one table of names for every format, and the shapes that go with it.

Formats: `diffusers` (WanTransformer3DModel), `wan` (the original release), `nvlabs` (NVlabs/rcm: the names of `wan`,
patch embedding as a Linear, keys prefixed `net.`), `internal` (this program). A row holds for both directions. Two
things happen to a tensor, both linear, so gradients convert like weights:

* several external tensors -> one internal tensor: rows interleaved per head, `[n, (q, k, v), d, ...]` flattened;
* one -> one: a reshape (the Conv3d patch embedding `[h, C, pt, ph, pw]` is the Linear `[h, C*pt*ph*pw]`).

Shapes: h hidden, n heads, d head dim, f ffn, p = C*pt*ph*pw, L text dim, q frequency dim; of images g width of CLIP's features, j tokens
that have a position.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from rcm_megatron.checkpoint.values import common_dtype

if TYPE_CHECKING:
    from rcm_megatron.config import ModelConfig

Names = str | tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """One module (or bare parameter) under its three names; `shapes`: parameter suffix -> internal shape in letters."""

    internal: str
    diffusers: Names
    wan: Names
    shapes: dict[str, str]


def _linear(out_dim: str, in_dim: str) -> dict[str, str]:
    return {".weight": f"{out_dim} {in_dim}", ".bias": out_dim}


UNUSED = (".attn2.norm_added_q.weight",)
"""Ends of keys that diffusers' files of Wan2.1 image-to-video hold, and that no network has a use for: diffusers ignores them too."""
_GLOBAL_BEFORE = (
    Row("patch_embedding", "patch_embedding", "patch_embedding", _linear("h", "pi")),
    Row("text_embedding.linear_1", "condition_embedder.text_embedder.linear_1", "text_embedding.0", _linear("h", "L")),
    Row("text_embedding.linear_2", "condition_embedder.text_embedder.linear_2", "text_embedding.2", _linear("h", "h")),
    Row("time_embedding.linear_1", "condition_embedder.time_embedder.linear_1", "time_embedding.0", _linear("h", "q")),
    Row("time_embedding.linear_2", "condition_embedder.time_embedder.linear_2", "time_embedding.2", _linear("h", "h")),
    Row("time_projection", "condition_embedder.time_proj", "time_projection.1", _linear("6h", "h")),
)
_NORM = {".weight": "h", ".bias": "h"}
_IMAGE = (
    Row("image_embedding.positions", "condition_embedder.image_embedder.pos_embed", "img_emb.emb_pos", {"": "1 j g"}),
    Row(
        "image_embedding.norm_1",
        "condition_embedder.image_embedder.norm1",
        "img_emb.proj.0",
        {".weight": "g", ".bias": "g"},
    ),
    Row(
        "image_embedding.linear_1",
        "condition_embedder.image_embedder.ff.net.0.proj",
        "img_emb.proj.1",
        _linear("g", "g"),
    ),
    Row("image_embedding.linear_2", "condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3", _linear("h", "g")),
    Row("image_embedding.norm_2", "condition_embedder.image_embedder.norm2", "img_emb.proj.4", _NORM),
)
_BLOCK = (
    Row("modulation", "scale_shift_table", "modulation", {"": "1 6 h"}),
    Row(
        "self_attn.linear_qkv",
        ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
        ("self_attn.q", "self_attn.k", "self_attn.v"),
        _linear("3h", "h"),
    ),
    Row("self_attn.q_norm", "attn1.norm_q", "self_attn.norm_q", {".weight": "h"}),
    Row("self_attn.k_norm", "attn1.norm_k", "self_attn.norm_k", {".weight": "h"}),
    Row("self_attn.linear_proj", "attn1.to_out.0", "self_attn.o", _linear("h", "h")),
    # The affine norm before cross-attention: the second of three in diffusers' order, `norm3` in the Wan release.
    Row("norm3", "norm2", "norm3", _NORM),
    Row("cross_attn.linear_q", "attn2.to_q", "cross_attn.q", _linear("h", "h")),
    Row("cross_attn.linear_kv", ("attn2.to_k", "attn2.to_v"), ("cross_attn.k", "cross_attn.v"), _linear("2h", "h")),
    Row("cross_attn.q_norm", "attn2.norm_q", "cross_attn.norm_q", {".weight": "h"}),
    Row("cross_attn.k_norm", "attn2.norm_k", "cross_attn.norm_k", {".weight": "h"}),
    Row(
        "cross_attn.image_linear_kv",
        ("attn2.add_k_proj", "attn2.add_v_proj"),
        ("cross_attn.k_img", "cross_attn.v_img"),
        _linear("2h", "h"),
    ),
    Row("cross_attn.image_k_norm", "attn2.norm_added_k", "cross_attn.norm_k_img", {".weight": "h"}),
    Row("cross_attn.linear_proj", "attn2.to_out.0", "cross_attn.o", _linear("h", "h")),
    Row("mlp.linear_fc1", "ffn.net.0.proj", "ffn.0", _linear("f", "h")),
    Row("mlp.linear_fc2", "ffn.net.2", "ffn.2", _linear("h", "f")),
)
_GLOBAL_AFTER = (
    Row("head.modulation", "scale_shift_table", "head.modulation", {"": "1 2 h"}),
    Row("head.linear", "proj_out", "head.head", _linear("po", "h")),
)


@dataclass(frozen=True)
class Entry:
    """One internal parameter and the external tensors that it is made of (one, or q/k/v, or k/v)."""

    internal: str
    external: tuple[str, ...]
    internal_shape: tuple[int, ...]
    external_shape: tuple[int, ...]
    head_dim: int

    @property
    def fused(self) -> bool:
        return len(self.external) > 1

    def join(self, parts: Iterable[Tensor]) -> Tensor:
        """External -> internal, one part in memory at a time. Parts may hold only some heads: rows `[n_local * d, ...]` each."""
        if not self.fused:
            (part,) = parts
            return part.reshape(self.internal_shape)
        joined = None
        for index, part in enumerate(parts):
            per_head = part.unflatten(0, (-1, self.head_dim))
            if joined is None:
                joined = per_head.new_empty(per_head.shape[0], len(self.external), *per_head.shape[1:])
            if joined.dtype != (wide := common_dtype(joined.dtype, part.dtype)):
                joined = joined.to(wide)
            joined[:, index] = per_head
        return joined.flatten(0, 2)

    def split(self, tensor: Tensor) -> Iterator[Tensor]:
        """Internal -> external, the inverse of `join`; each result owns its memory where it was interleaved."""
        if not self.fused:
            yield tensor.reshape(self.external_shape)
            return
        per_head = tensor.unflatten(0, (-1, len(self.external), self.head_dim))
        for index in range(len(self.external)):
            yield per_head[:, index].flatten(0, 1).contiguous()


@dataclass(frozen=True)
class KeyMap:
    """The names of one format. `prefix` is written in front of every key; a source has it removed already."""

    name: str
    column: str
    conv_patch: bool
    prefix: str = ""

    def entries(self, config: ModelConfig) -> dict[str, Entry]:
        """Internal name -> Entry for every parameter of the model, in the order in which the network runs."""
        sizes, absent = _sizes(config), _absent(config)
        blocks = [f"blocks.{index}." for index in range(config.num_layers)]
        scopes = (("", _GLOBAL_BEFORE + _IMAGE), *((scope, _BLOCK) for scope in blocks), ("", _GLOBAL_AFTER))
        rows = ((scope, row) for scope, table in scopes for row in table if not row.internal.startswith(absent))
        entries = (entry for scope, row in rows for entry in self._expand(row, config, sizes, scope))
        return {entry.internal: entry for entry in entries}

    def names(self) -> Iterator[str]:
        """Every parameter's name, of any network, a block's number written as `#`."""
        for scope, table in (("", _GLOBAL_BEFORE + _IMAGE + _GLOBAL_AFTER), ("blocks.#.", _BLOCK)):
            for row in table:
                columns = getattr(row, self.column)
                for name in (columns,) if isinstance(columns, str) else columns:
                    yield from (f"{scope}{name}{suffix}" for suffix in row.shapes)

    def _expand(self, row: Row, config: ModelConfig, sizes: dict[str, int], scope: str) -> list[Entry]:
        names = getattr(row, self.column)
        names = (names,) if isinstance(names, str) else names
        entries = []
        for suffix, letters in row.shapes.items():
            shape = tuple(sizes[letter] if letter in sizes else int(letter) for letter in letters.split())
            external_shape = shape if len(names) == 1 else (shape[0] // len(names), *shape[1:])
            if self.conv_patch and row.internal + suffix == "patch_embedding.weight":
                external_shape = (shape[0], config.embedded_channels, *config.patch_size)
            external = tuple(f"{scope}{name}{suffix}" for name in names)
            head_dim = config.hidden_size // config.num_heads
            entries.append(Entry(f"{scope}{row.internal}{suffix}", external, shape, external_shape, head_dim))
        return entries


def _sizes(config: ModelConfig) -> dict[str, int]:
    h, patch = config.hidden_size, config.patch_volume
    sizes = {"h": h, "2h": 2 * h, "3h": 3 * h, "6h": 6 * h, "f": config.ffn_hidden_size}
    sizes |= {"L": config.text_dim, "q": config.freq_dim, "pi": config.embedded_channels * patch}
    if config.wan is not None:
        sizes |= {"g": config.wan.image_dim, "j": config.wan.image_positions}
    return sizes | {"po": config.out_channels * patch}


def _absent(config: ModelConfig) -> tuple[str, ...]:
    """Beginnings of the internal names of modules that this network does not have."""
    absent = () if config.cross_attn_norm else ("norm3",)
    if config.wan is None or config.wan.image_dim is None:
        return (*absent, "image_embedding.", "cross_attn.image_")
    return absent if config.wan.image_positions else (*absent, "image_embedding.positions")


KEY_MAPS: dict[str, KeyMap] = {
    "diffusers": KeyMap("diffusers", column="diffusers", conv_patch=True),
    "wan": KeyMap("wan", column="wan", conv_patch=True),
    "nvlabs": KeyMap("nvlabs", column="wan", conv_patch=False, prefix="net."),
    "internal": KeyMap("internal", column="internal", conv_patch=False),
}
