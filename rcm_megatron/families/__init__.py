"""Families of networks: each a package with one value, all that the program knows of the family. Importing this imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rcm_megatron.registry import Registry

if TYPE_CHECKING:
    from rcm_megatron.config import ModelConfig
    from rcm_megatron.families.family import Family

FAMILIES: Registry[Family] = Registry(
    "model family",
    {"wan": "rcm_megatron.families.wan:WAN", "cosmos": "rcm_megatron.families.cosmos:COSMOS"},
)
"""`model.family` -> the family."""


def family_of(model: ModelConfig) -> Family:
    """The family of a network. Raises UserError for one that is not registered."""
    return FAMILIES[model.family]
