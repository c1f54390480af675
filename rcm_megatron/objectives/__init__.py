"""What networks are trained for: one file an objective, one value each (rcm_megatron.objectives.base.Objective).

In the order of this table the objectives of a step add up their gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rcm_megatron.registry import Registry

if TYPE_CHECKING:
    from rcm_megatron.objectives.base import Objective

OBJECTIVES: Registry[Objective] = Registry(
    "objective",
    {
        "flow": "rcm_megatron.objectives.flow:FLOW",
        "dcm": "rcm_megatron.objectives.dcm:DCM",
        "scm": "rcm_megatron.objectives.scm:SCM",
        "dmd": "rcm_megatron.objectives.dmd:DMD",
        "fake_score": "rcm_megatron.objectives.fake_score:FAKE_SCORE",
    },
)


def settings_of(name: str, given: Mapping[str, Any]) -> Any:
    """The settings of an objective: those that a run gives, or its defaults."""
    return given[name] if name in given else OBJECTIVES[name].Settings()
