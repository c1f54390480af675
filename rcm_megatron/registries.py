"""What the program knows by name, and where it is found: families of networks, objectives, formats of checkpoints.

The lowest layer: whoever only asks for a name imports this, and neither torch nor the packages that hold the values. An entry is imported
when it is first used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rcm_megatron.registry import Registry

if TYPE_CHECKING:
    from rcm_megatron.checkpoint.formats.base import Format
    from rcm_megatron.checkpoint.lora.naming import LoraNaming
    from rcm_megatron.config import ModelConfig
    from rcm_megatron.families.family import Family
    from rcm_megatron.objectives.base import Objective

FAMILIES: Registry[Family] = Registry(
    "model family",
    {"wan": "rcm_megatron.families.wan:WAN", "cosmos": "rcm_megatron.families.cosmos:COSMOS"},
)
"""`model.family` -> the family."""

OBJECTIVES: Registry[Objective] = Registry(
    "objective",
    {
        "flow": "rcm_megatron.objectives.flow:FLOW",
        "dcm": "rcm_megatron.objectives.dcm:DCM",
        "scm": "rcm_megatron.objectives.scm:SCM",
        "emd": "rcm_megatron.objectives.emd:EMD",
        "lmd": "rcm_megatron.objectives.lmd:LMD",
        "mean_flow": "rcm_megatron.objectives.mean_flow:MEAN_FLOW",
        "dmd": "rcm_megatron.objectives.dmd:DMD",
        "fake_score": "rcm_megatron.objectives.fake_score:FAKE_SCORE",
    },
)
"""`stages.N.losses` -> the objective. In this order the objectives of a step add up their gradients."""

FORMATS: Registry[Format] = Registry(
    "checkpoint format",
    {
        "diffusers": "rcm_megatron.checkpoint.formats.diffusers:DIFFUSERS",
        "wan": "rcm_megatron.checkpoint.formats.released:WAN",
        "nvlabs": "rcm_megatron.checkpoint.formats.released:NVLABS",
        "nvidia": "rcm_megatron.checkpoint.formats.released:NVIDIA",
        "internal": "rcm_megatron.checkpoint.formats.ours:INTERNAL",
        "torch_dist": "rcm_megatron.checkpoint.formats.ours:TORCH_DIST",
    },
)
"""`--to` of a conversion -> the format."""

LORA_NAMINGS: Registry[LoraNaming] = Registry(
    "LoRA naming",
    {name.lower(): f"rcm_megatron.checkpoint.lora.naming:{name}" for name in ("DIFFUSERS", "NATIVE", "MUSUBI")},
)
"""`--naming` of a LoRA file -> the naming; all of them are read."""


def family_of(model: ModelConfig) -> Family:
    """The family of a network. Raises UserError for one that is not registered."""
    return FAMILIES[model.family]


def settings_of(name: str, given: Mapping[str, Any]) -> Any:
    """The settings of an objective: those that a run gives, or its defaults. Raises UserError for a name that is not registered."""
    return given[name] if name in given else OBJECTIVES[name].Settings()
