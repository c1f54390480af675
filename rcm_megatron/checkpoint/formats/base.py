"""What a format is: names for a family's weights, a description of the network, and a way to lie on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from rcm_megatron.config import ModelConfig
from rcm_megatron.errors import CheckpointError
from rcm_megatron.families.family import Family, Naming
from rcm_megatron.inputs import WholeInput
from rcm_megatron.registries import FAMILIES, FORMATS, family_of


@dataclass(frozen=True, kw_only=True)
class WriteOptions:
    """How a checkpoint is written, whatever its format."""

    dtype: torch.dtype | None = None
    """Of all tensors; None: each keeps its own."""
    max_shard_bytes: int = 5 * 10**9
    """Of one file, where a format has several."""
    force: bool = False
    """Replace a checkpoint that is there."""
    metadata: Mapping[str, str] | None = None
    """Provenance, for headers that hold it."""
    texts: Mapping[str, str] | None = None
    """Further files of a folder by name, such as a README.md."""
    check: Callable[[Path], None] | None = None
    """Called with what was written under its temporary name; what it raises keeps it from appearing."""


class Container(Protocol):
    """How weights lie on disk: they appear complete or not at all."""

    def check_path(self, path: Path, *, format: str) -> None:
        """Raises CheckpointError for a path that cannot be one of a format."""
        ...

    def write(
        self, path: Path, tensors: Iterable[tuple[str, Tensor]], config: Mapping[str, Any] | None, options: WriteOptions
    ) -> None:
        """Write `tensors` as they come, and `config` beside them where there is a place for it."""
        ...


class Format:
    """One format. Subclasses say what is special; a family contributes its names under the format's (`Family.namings`)."""

    def __init__(self, name: str, container: Container) -> None:
        self.name, self.container = name, container

    def naming(self, family: Family) -> Naming | None:
        """The family's names in this format, or None if there are none."""
        return family.namings.get(self.name)

    def naming_of(self, model: ModelConfig) -> Naming:
        """The names of a network. Raises CheckpointError where the format does not know its family."""
        family = family_of(model)
        naming = self.naming(family)
        if naming is None:
            known = [FAMILIES[name].title for name in FAMILIES if self.naming(FAMILIES[name]) is not None]
            raise CheckpointError(
                f"there is no format {self.name!r} of a {family.title} network, but of {', '.join(known)}"
            )
        if model.second_time and not naming.second_time:
            holding = [form.name for form in FORMATS.values() if (own := form.naming(family)) and own.second_time]
            raise CheckpointError(
                f"got a network of two times (second_time=true) and the format {self.name!r}, whose {family.title} has one; need "
                f"{' or '.join(holding)}, which `sample` reads; fix: `convert --to {holding[0]}`, or second_time=false for a network of one"
            )
        return naming

    def how_to_load(self, model: ModelConfig, path: str) -> str:
        """A line of Python, for the model card."""
        return f"open_checkpoint({path!r})  # rcm_megatron.checkpoint.sources"

    takes_companions = False
    """A run's student in it is sampled by another library, with files beside its weights (`model_card.Companions`)."""

    library: str | None = None
    """Another program that runs networks in this format, which `forward` calls; None: this one runs them."""

    def forward(self, model: ModelConfig, folder: Path, given: WholeInput, *, dtype: torch.dtype | None) -> Tensor:
        """Velocity [B, C, T, H, W] of the network in `folder`, fp64 on the CPU, by `library`, its weights rounded to `dtype`."""
        raise NotImplementedError
