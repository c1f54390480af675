"""A LoRA as a file, in any naming: B holds the scale, so that every reader's scale is 1."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from rcm_megatron.checkpoint.formats.base import WriteOptions
from rcm_megatron.checkpoint.lora.naming import LoraNaming
from rcm_megatron.checkpoint.lora.read import Place
from rcm_megatron.checkpoint.writers import write_file
from rcm_megatron.config import ModelConfig
from rcm_megatron.errors import CheckpointError

Factors = Mapping[Place, tuple[Tensor, Tensor]]
"""(A ``[r, in]``, B ``[out, r]``) of external tensors; the change is B · A."""


def check_lora_path(path: Path, *, force: bool) -> None:
    """Raises CheckpointError for a path that is no .safetensors file, and for one that exists unless ``force``."""
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: a LoRA is one file; end its name in .safetensors")
    if path.is_dir() or (path.exists() and not force):
        raise CheckpointError(f"{path} exists; choose another target, or pass --force to replace a file")


def write_lora(
    path: Path,
    factors: Factors,
    model: ModelConfig,
    naming: LoraNaming,
    *,
    dtype: torch.dtype,
    metadata: Mapping[str, str],
    force: bool = False,
    differences: Mapping[str, Tensor] | None = None,
) -> None:
    """Write ``factors``, and ``differences`` (by the keys of the naming) as they are. Raises CheckpointError for what the naming lacks."""
    entries, tensors = naming.entries(model), {}
    most = max((down.shape[0] for down, _ in factors.values()), default=0)
    for (internal, index), (down, up) in factors.items():
        entry = entries[internal]
        if not naming.holds(internal, entry):
            raise CheckpointError(
                f"the naming {naming.name} has no LoRA of {internal!r}; need one of another naming, or other targets"
            )
        if naming.one_rank:
            down, up = _padded(down, up, most)
        key = naming.key(entry.external[index].removesuffix(".weight"))
        tensors |= _pair(key, down, up, naming, conv=entry.external_shape[2:], channels=entry.external_shape[1])
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()} | dict(differences or {})
    write_file(path, tensors.items(), WriteOptions(metadata=metadata, force=force))


def _pair(
    key: str, down: Tensor, up: Tensor, naming: LoraNaming, *, conv: tuple[int, ...], channels: int
) -> dict[str, Tensor]:
    if conv:
        down, up = down.reshape(-1, channels, *conv), up.reshape(*up.shape, *(1 for _ in conv))
    alpha = {f"{key}.alpha": torch.tensor(float(down.shape[0]))} if naming.writes_alpha else {}
    return {key + naming.down: down.contiguous(), key + naming.up: up.contiguous(), **alpha}


def _padded(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    missing = rank - down.shape[0]
    pad = torch.nn.functional.pad
    return pad(down, (0, 0, 0, missing)), pad(up, (0, missing))
