"""Key maps: one table of names for every format of a family, and the shapes that go with it.

A row of a table holds for all directions. Two things happen to a tensor, both linear, so gradients convert like weights:

* several external tensors -> one internal tensor: rows interleaved per head, `[n, (q, k, v), d, ...]` flattened;
* one -> one: a reshape (a Conv3d patch embedding `[h, C, pt, ph, pw]` is the Linear `[h, C*pt*ph*pw]`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from rcm_megatron.dtypes import common_dtype

if TYPE_CHECKING:
    from rcm_megatron.config import ModelConfig

PATCH_EMBEDDING = "patch_embedding.weight"
"""The internal name of what may be a Conv3d elsewhere."""


@dataclass(frozen=True)
class Row:
    """One module, or bare parameter."""

    names: tuple[str, ...]
    """In the order of the table's columns; those of several tensors that become one are set apart by spaces. Empty: a format has none."""
    shapes: Mapping[str, str]
    """Suffix of a parameter -> its internal shape, in the letters of the table's sizes (or numbers), set apart by spaces."""


@dataclass(frozen=True)
class KeyTable:
    """Names of a family's parameters, in the order in which the network runs."""

    columns: tuple[str, ...]
    """Whose names the rows have; the first is `internal`."""
    before: tuple[Row, ...]
    block: tuple[Row, ...]
    """Of each block, without the block's own beginning."""
    after: tuple[Row, ...]
    sizes: Callable[[ModelConfig], Mapping[str, int | None]]
    """Letter of a shape -> its size in this network."""
    absent: Callable[[ModelConfig], tuple[str, ...]]
    """Beginnings of the internal names of modules that this network does not have."""


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
        """Whether it is made of several external tensors."""
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
    """The names of one format."""

    table: KeyTable
    column: str
    prefix: str = ""
    """Written in front of every key; a source has it removed already."""
    blocks: str = "blocks"
    """What the keys of block i begin with, before `.i.`."""
    conv_patch: bool = False
    """The patch embedding is a Conv3d."""

    def entries(self, model: ModelConfig) -> dict[str, Entry]:
        """Internal name -> Entry for every parameter of the network, in the order in which it runs."""
        table, sizes, absent = self.table, self.table.sizes(model), self.table.absent(model)
        blocks = [(f"blocks.{index}.", f"{self.blocks}.{index}.", table.block) for index in range(model.num_layers)]
        scopes = [("", "", table.before), *blocks, ("", "", table.after)]
        entries = [
            entry
            for inside, outside, rows in scopes
            for row in rows
            if not row.names[0].startswith(absent)
            for entry in self._expanded(row, model, sizes, inside, outside)
        ]
        return {entry.internal: entry for entry in entries}

    def names(self) -> Iterator[str]:
        """Every parameter's name, of any network, a block's number written as `#`."""
        for outside, rows in (("", self.table.before + self.table.after), (f"{self.blocks}.#.", self.table.block)):
            for row in rows:
                for name in row.names[self.table.columns.index(self.column)].split():
                    yield from (f"{outside}{name}{suffix}" for suffix in row.shapes)

    def _expanded(
        self, row: Row, model: ModelConfig, sizes: Mapping[str, int | None], inside: str, outside: str
    ) -> Iterator[Entry]:
        names = row.names[self.table.columns.index(self.column)].split()
        for suffix, letters in row.shapes.items():
            internal = inside + row.names[0] + suffix
            shape = tuple(sizes[letter] if letter in sizes else int(letter) for letter in letters.split())
            external_shape = (shape[0] // len(names), *shape[1:])
            if self.conv_patch and internal == PATCH_EMBEDDING:
                external_shape = (shape[0], model.embedded_channels, *model.patch_size)
            external = tuple(f"{outside}{name}{suffix}" for name in names)
            yield Entry(internal, external, shape, external_shape, model.head_dim)
