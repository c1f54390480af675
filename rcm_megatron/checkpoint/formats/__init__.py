"""Formats of checkpoints: each one value. Reading their names imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rcm_megatron.registry import Registry

if TYPE_CHECKING:
    from rcm_megatron.checkpoint.formats.base import Format

_HERE = "rcm_megatron.checkpoint.formats"
FORMATS: Registry[Format] = Registry(
    "checkpoint format",
    {
        "diffusers": f"{_HERE}.diffusers:DIFFUSERS",
        "wan": f"{_HERE}.released:WAN",
        "nvlabs": f"{_HERE}.released:NVLABS",
        "nvidia": f"{_HERE}.released:NVIDIA",
        "internal": f"{_HERE}.ours:INTERNAL",
        "torch_dist": f"{_HERE}.ours:TORCH_DIST",
    },
)
"""`--to` of a conversion -> the format."""
